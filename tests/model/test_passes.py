"""A pass over prompts, for routing."""

import pytest
import torch

from router.model.passes import batches


def test_a_batch_that_does_not_fit_is_read_in_halves(base):
    rows, full = [[n] * 3 for n in range(7)], torch.OutOfMemoryError("CUDA out of memory.")

    def read(ids, mask, most=2, error=full):
        if len(ids) > most:
            raise error
        return ids.tolist()

    parts = list(batches(base.model, rows, 0, None, read))
    found = [pair for numbers, some in parts for pair in zip(numbers, some, strict=True)]
    assert sorted(found) == list(enumerate(rows))
    for error in (full, RuntimeError("x")):
        with pytest.raises(RuntimeError) as raised:
            list(batches(base.model, rows, 0, None, lambda *of, error=error: read(*of, 0, error)))
        assert raised.value is error
