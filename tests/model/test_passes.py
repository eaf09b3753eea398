"""What routing reads of a prompt, short ones whole and the two ends of long ones, and a pass over it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from router.model.answer import pad_left
from router.model.passes import MAX_TOKENS, batches, forward, truncated


@pytest.mark.parametrize("length", [1, 2, MAX_TOKENS - 1, MAX_TOKENS])
def test_a_short_prompt_is_read_whole(length):
    assert truncated([tuple(range(length))]) == [list(range(length))]


@pytest.mark.parametrize("length", [MAX_TOKENS + 1, 10 * MAX_TOKENS])
def test_of_a_long_prompt_both_ends_are_read(length):
    half = MAX_TOKENS // 2
    assert truncated([[7], list(range(length))]) == [[7], [*range(half), *range(length - half, length)]]


def test_a_pass_over_a_padded_batch_ends_as_on_each_alone(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    rows = [[7], [5, 60, 7, 91, 12], [200, 33, 4]]
    with torch.no_grad():
        found = forward(model, *pad_left(rows, 0, "cpu"))
        expected = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
    assert found.shape == (3, model.config.vocab_size)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_batch_that_does_not_fit_is_read_in_halves_and_every_row_once(base):
    rows, tried = [[n] * 3 for n in range(7)], []

    def read(ids, mask):
        tried.append(len(ids))
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return ids.tolist()

    parts = list(batches(base.model, rows, 0, None, read))
    found = [pair for numbers, some in parts for pair in zip(numbers, some, strict=True)]
    assert sorted(found) == list(enumerate(rows))
    assert tried == [7, 3, 1, 2, 2, 2]  # 3 and 4, then all in halves


@pytest.mark.parametrize(
    ("error", "times"), [(torch.OutOfMemoryError("CUDA out of memory."), 3), (RuntimeError("shapes"), 1)]
)
def test_what_halves_do_not_help_is_raised(error, times, base):
    tried = []

    def read(ids, mask):
        tried.append(len(ids))
        raise error

    with pytest.raises(RuntimeError) as raised:
        list(batches(base.model, [[5, 6]] * 4, 0, None, read))
    assert raised.value is error and tried == [4, 2, 1][:times]
