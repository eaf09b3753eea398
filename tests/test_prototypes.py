import numpy as np
import torch
from conftest import write_tiny_adapter

from merge.factors import dense
from router.adapters import load_library
from router.prototypes import prototypes


def test_prototypes_are_the_dense_updates_right_singular_vectors(tiny_library):
    adapters = load_library([str(tiny_library)])
    found = prototypes(adapters)
    x = np.random.default_rng(5).standard_normal(48)
    checked = 0
    for owner, adapter in enumerate(adapters):
        for module, update in adapter.read_all():
            _, s, vh = np.linalg.svd(dense(update).double().numpy(), full_matrices=False)
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


def test_prototypes_do_not_depend_on_the_adapters_size(tmp_path):
    write_tiny_adapter(tmp_path / "a" / "one", 7, alpha=4)
    write_tiny_adapter(tmp_path / "b" / "one", 7, alpha=4000)
    small, large = (prototypes(load_library([str(tmp_path / name)])) for name in "ab")
    for module in small:
        torch.testing.assert_close(small[module].weights, large[module].weights, atol=1e-5, rtol=1e-4)
        overlap = (small[module].directions.T @ large[module].directions).abs()
        torch.testing.assert_close(overlap, torch.eye(4), atol=1e-3, rtol=0)


def test_an_update_of_zero_has_no_prototype(tmp_path):
    write_tiny_adapter(tmp_path / "zero", 1, size=0.0)
    assert prototypes(load_library([str(tmp_path / "zero")])) == {}
