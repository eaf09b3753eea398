"""Variants: the exact weighted sum of updates, in the file, under PEFT and in the model's logits."""

import numpy as np
import pytest
import torch

from helpers import MIXED, active, delta, dense_updates, raw_factors
from merge.factors import Factors
from router.model.base import linear_shapes, load_base
from router.routing.variants import Variant, complete, decide, limited, write_variant


def test_decide_drops_negligible_shares_and_keeps_sums_of_one():
    rows = np.array(
        [[0.6, 0.395, 0.005, 0.0], [0.2, 0.3, 0.1, 0.4], [0.005, 0.0, 0.99, 0.005], [0.98, 0.0101, 0.0099, 0]]
    )
    mixed, soft, agreed, hundredth = decide(rows, ["a", "b", "c"])
    assert mixed.weights == pytest.approx({"a": 0.6 / 0.995, "b": 0.395 / 0.995})
    assert list(soft.weights.items()) == [("b", 0.3), ("a", 0.2), ("c", 0.1)] and soft.base == 0.4
    assert agreed == Variant({"c": 1.0}, 0.0)
    assert hundredth.weights == pytest.approx({"a": 0.98 / 0.9901, "b": 0.0101 / 0.9901})
    for variant in (mixed, soft, agreed, hundredth):
        assert sum(variant.weights.values()) + variant.base == pytest.approx(1, abs=1e-12)
    assert decide(np.array([[0.004, 0.996]]), ["a"]) == [Variant({}, 1.0)]
    many = np.full((1, 401), 1 / 401)  # of many small shares none is negligible
    (even,) = decide(many, names := [f"a{n}" for n in range(400)])
    assert len(even.weights) == 400 and even.base == pytest.approx(1 / 401)
    many[0, 7] += 1e-3
    led, other = decide(np.concatenate([many / many.sum(), np.eye(401)[:1]]), names)
    assert next(iter(led.weights)) == "a7" and len(led.weights) == 400 and other == Variant({"a0": 1.0}, 0.0)


def test_a_written_variant_has_the_asked_rank(tmp_path, base, adapters):
    shapes = linear_shapes(base.model)
    assert write_variant(tmp_path / "exact", MIXED, adapters, base, shapes) == 8  # 6 + 2, or 4 + 2
    assert write_variant(tmp_path / "one", MIXED, adapters, base, shapes, 1) == 1
    assert {a.shape[0] for a, _ in raw_factors(tmp_path / "one").values()} == {1}
    assert write_variant(tmp_path / "three", MIXED, adapters, base, shapes, 3) == 3  # padded to no more
    assert {a.shape[0] for a, _ in raw_factors(tmp_path / "three").values()} == {3}


@pytest.mark.parametrize("rank", [None, 8])
def test_more_columns_than_are_read_become_as_many_as_the_layer_is_wide(monkeypatch, rank):
    monkeypatch.setattr("router.routing.variants.LARGEST_RANK", 7)
    many = Factors(torch.randn(9, 4), torch.randn(6, 9))
    found = limited(many, rank)
    assert found.rank == 4
    np.testing.assert_allclose(delta(found), delta(many), atol=1e-5)


def test_complete_fills_up_a_kind_but_adds_none():
    shapes = {f"m.{n}.{kind}": (6, 4) for n in range(3) for kind in ("q", "v", "up")}
    ones = Factors(torch.ones(2, 4), torch.ones(6, 2))
    found = complete({"m.1.q": ones, "m.0.up": ones}, shapes)
    assert list(found) == ["m.0.q", "m.0.up", "m.1.q", "m.1.up", "m.2.q", "m.2.up"]
    assert found["m.1.q"] is ones and found["m.0.up"] is ones
    for module in ("m.0.q", "m.1.up", "m.2.q", "m.2.up"):
        assert delta(found[module]).shape == (6, 4) and not delta(found[module]).any()


def test_a_variant_is_written_in_the_base_models_dtype(tmp_path, tiny_base, tiny_library, adapters):
    half = load_base(str(tiny_base), "cpu", "bfloat16")
    write_variant(tmp_path / "v", MIXED, adapters, half, linear_shapes(half.model))
    expected = {}
    for name, weight in MIXED.weights.items():
        for module, update in dense_updates(tiny_library / name).items():
            expected[module] = expected.get(module, 0) + weight * update
    for module, (a, b) in raw_factors(tmp_path / "v").items():
        assert a.dtype == b.dtype == torch.bfloat16
        gap = np.linalg.norm((b.double() @ a.double()).numpy() - expected[module])
        assert gap < 0.01 * np.linalg.norm(expected[module])
    with active(half, tmp_path / "v") as model:
        lora = [weight for name, weight in model.named_parameters() if "lora_" in name]
        assert lora and all(weight.dtype == torch.bfloat16 for weight in lora)
