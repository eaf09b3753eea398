"""A pass over prompts, for routing."""

import pytest
import torch

from router.model.passes import batches


def test_a_batch_that_does_not_fit_is_read_in_halves(base):
    rows, tried = [[n] * 3 for n in range(7)], []

    def read(ids, mask, most=2, error=None):
        tried.append(len(ids))
        if len(ids) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory.")
        return ids.tolist()

    parts = list(batches(base.model, rows, 0, None, read))
    found = [pair for numbers, some in parts for pair in zip(numbers, some, strict=True)]
    assert sorted(found) == list(enumerate(rows))
    assert tried == [7, 3, 1, 2, 2, 2]  # 3 and 4, then all in halves
    for error, sizes in (
        (torch.OutOfMemoryError("CUDA out of memory."), [4, 2, 1]),
        (RuntimeError("x"), [4]),
    ):
        tried.clear()
        with pytest.raises(RuntimeError) as raised:
            list(batches(base.model, rows[:4], 0, None, lambda *of, error=error: read(*of, 0, error)))
        assert raised.value is error and tried == sizes
