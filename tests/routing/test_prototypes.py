"""Prototypes against dense decompositions, and what is kept of them between runs."""

import shutil
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from helpers import delta, write_tiny_adapter
from router.library.adapters import load_library
from router.routing.prototypes import prototypes


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("router.library.store.cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_prototypes_are_the_right_singular_vectors(tiny_library, tmp_path):
    adapters = load_library([str(tiny_library)])
    found = prototypes(adapters)
    x = np.random.default_rng(5).standard_normal(48)
    checked = 0
    for owner, adapter in enumerate(adapters):
        for module, update in adapter.read_all():
            _, s, vh = np.linalg.svd(delta(update), full_matrices=False)
            s, vh = s[: update.rank], vh[: update.rank]
            along = vh @ x[: vh.shape[1]]
            proto = found[module]
            mine = proto.owners == owner
            cosines = torch.from_numpy(x[: vh.shape[1]]).float() @ proto.directions[:, mine]
            np.testing.assert_allclose(proto.weights[mine].sum(), 1, rtol=1e-5)
            np.testing.assert_allclose(
                (cosines.square() * proto.weights[mine]).sum(), (along**2 * s).sum() / s.sum(), rtol=1e-4
            )
            checked += 1
    assert checked == 8 + 14 + 6
    write_tiny_adapter(tmp_path / "zero", 1, size=0.0)  # which has none
    assert prototypes(load_library([str(tmp_path / "zero")])) == {}


def test_a_library_that_was_seen_before_is_not_decomposed_again(tiny_library, cache, monkeypatch):
    adapters = load_library([str(tiny_library)])
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


def test_a_cache_that_cannot_be_written_costs_time_alone(tiny_library, cache, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/another file system")  # files are written where they stay
    with monkeypatch.context() as patch:
        error = SafetensorError("Error while serializing: I/O error: No space left on device")
        patch.setattr("router.library.store.save_file", Mock(side_effect=error))
        assert prototypes(load_library([str(tiny_library)]))
    assert not [path for path in cache.rglob("*") if path.is_file()]
    prototypes(load_library([str(tiny_library)]))
    assert len(list(cache.rglob("*.safetensors"))) == 3
    shutil.rmtree(cache)
    cache.touch()
    assert prototypes(load_library([str(tiny_library)]))
