"""What is kept of prototypes between runs; test_probe.py compares them with dense decompositions."""

import shutil
from unittest.mock import Mock

import pytest
import torch
from safetensors import SafetensorError

from router.routing.prototypes import prototypes


def test_a_library_that_was_seen_before_is_not_decomposed_again(adapters, cache, monkeypatch):
    first = prototypes(adapters, dtype=torch.bfloat16)
    monkeypatch.setattr("router.routing.prototypes.svd", Mock(side_effect=AssertionError("decomposed")))
    again = prototypes(adapters[::-1], dtype=torch.bfloat16)
    assert again.keys() == first.keys()
    for module, proto in first.items():
        for owner in range(3):
            mine, now = proto.owners == owner, again[module].owners == 2 - owner
            assert torch.equal(proto.directions[:, mine], again[module].directions[:, now])
            assert torch.equal(proto.weights[mine], again[module].weights[now])
    with pytest.raises(AssertionError, match="decomposed"):  # other numbers, so not those
        prototypes(adapters, dtype=torch.float32)


def test_a_cache_that_cannot_be_written_costs_time_alone(adapters, cache, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/another file system")  # files are written where they stay
    with monkeypatch.context() as patch:
        error = SafetensorError("Error while serializing: I/O error: No space left on device")
        patch.setattr("router.library.store.save_file", Mock(side_effect=error))
        assert prototypes(adapters)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    prototypes(adapters)
    assert len(list(cache.rglob("*.safetensors"))) == 3
    shutil.rmtree(cache)
    cache.touch()
    assert prototypes(adapters)
