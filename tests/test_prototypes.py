import torch
from conftest import write_tiny_adapter

from merge.factors import dense
from router.adapters import load_library
from router.prototypes import prototypes


def test_weighted_squared_cosine_is_the_share_of_the_update_that_an_input_frees(tiny_library):
    adapters = load_library([str(tiny_library)])
    found = prototypes(adapters)
    x = torch.nn.functional.normalize(torch.randn(48, generator=torch.Generator().manual_seed(5)), dim=0)
    checked = 0
    for owner, adapter in enumerate(adapters):
        for module, update in adapter.read_all():
            d = dense(update).double()
            unit = torch.nn.functional.normalize(x[: d.shape[1]].double(), dim=0)
            expected = (d @ unit).square().sum() / d.square().sum()
            proto = found[module]
            mine = proto.owners == owner
            cosine = unit.float() @ proto.directions[:, mine]
            torch.testing.assert_close(
                (cosine.square() * proto.weights[mine]).sum().double(), expected, atol=1e-6, rtol=1e-4
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
