"""One variant after the other on one base model: PEFT's own weights and logits, and no trace afterwards."""

import copy
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from helpers import MIXED, active, family, logits, plain_model, random_update
from merge.factors import dense
from merge.folders import write_adapter
from router.model.apply import Beside, Merged, applied
from router.model.base import linear_shapes, load_base
from router.routing.variants import Variant, write_variant
from router.system.errors import InputError

EXPERTS = {
    "moe_intermediate_size": 24, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def lora_weights(model):
    return {name: weight for name, weight in model.named_parameters() if "lora_" in name}


# The same modules at a higher rank (1 stays 1, others become 8), at the same, at a lower; others; none.
SWAPPED = (
    "attention 1", "attention 4", "attention 2", "attention 1", "everything 2", "mlp 3", None, "attention 2",
)  # fmt: skip


def swapped(tmp_path, base, adapters):
    """The folders of SWAPPED."""
    folders = [name and tmp_path / name for name in SWAPPED]
    for name, folder in zip(SWAPPED, folders, strict=True):
        if name and not folder.exists():
            adapter, rank = name.split()
            only = Variant({adapter: 1.0}, 0.0)
            write_variant(folder, only, adapters, base, linear_shapes(base.model), int(rank))
    return folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_swapped_variant_has_the_weights_that_peft_loads(tmp_path, tiny_base, adapters, dtype):
    base = load_base(str(tiny_base), "cpu", dtype)
    before, weights = logits(base.model), copy.deepcopy(base.model.state_dict())
    folders = swapped(tmp_path, base, adapters)
    written = {file: file.read_bytes() for file in tmp_path.rglob("adapter_model.safetensors")}
    with Beside(base) as swap:
        for folder in folders:
            found = swap.activate(folder)
            if folder is None:
                assert found is base.model and torch.equal(logits(found), before)
                continue
            how = {"adapter_name": "variant", "autocast_adapter_dtype": False}
            theirs = plain_model(base.name, folder, base.model.dtype, **how)
            mine, expected = lora_weights(found), lora_weights(theirs)
            assert mine.keys() == expected.keys()
            assert all(torch.equal(weight, expected[name]) for name, weight in mine.items())
            torch.testing.assert_close(logits(found), logits(theirs), atol=1e-5, rtol=1e-5)
    assert {file: file.read_bytes() for file in written} == written
    assert torch.equal(logits(base.model), before)
    assert base.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in base.model.state_dict().items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_the_exact_sum_and_come_back(tmp_path, tiny_base, adapters, dtype):
    base = load_base(str(tiny_base), "cpu", dtype)
    weights = {name: value.clone() for name, value in base.model.state_dict().items()}
    with applied(base, "merged") as models:
        for folder in swapped(tmp_path, base, adapters):
            assert models.activate(folder) is base.model
            updates = {}
            if folder:
                tensors = load_file(folder / "adapter_model.safetensors")
                for key in tensors:
                    module = key.removeprefix("base_model.model.").partition(".lora_")[0]
                    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double() for x in "AB")
                    updates[f"{module}.weight"] = b @ a  # alpha is the rank
            for name, value in base.model.state_dict().items():
                if name in updates:
                    expected = (weights[name].double() + updates[name]).to(value.dtype)
                    # One unit in the last place, where float64 and float32 round to different sides.
                    torch.testing.assert_close(value, expected, rtol=torch.finfo(value.dtype).eps, atol=1e-6)
                else:
                    assert torch.equal(value, weights[name])
    assert all(torch.equal(value, weights[key]) for key, value in base.model.state_dict().items())


def test_what_peft_takes_for_fused_experts_is_added_by_hooks(tmp_path, tiny_base):
    """PEFT finds `down_proj` of GLM 4 MoE in its experts alone, not in dense layers and shared experts."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.save_pretrained(tmp_path / "base")
    family("glm4_moe", len(tokenizer), **EXPERTS).save_pretrained(tmp_path / "base")
    base, expected = load_base(str(tmp_path / "base"), "cpu", "float32"), plain_model(str(tmp_path / "base"))
    updates = {}
    for module, (d_out, d_in) in linear_shapes(base.model).items():
        updates[module] = random_update(d_out, 2, d_in, len(updates))
        expected.get_submodule(module).weight.data += dense(updates[module])
    write_adapter(tmp_path / "all", updates, base.name)
    attention = {module: update for module, update in updates.items() if "self_attn" in module}
    write_adapter(tmp_path / "attention", attention, base.name)
    before = logits(base.model)
    with applied(base, "beside") as models:
        for folder in ("all", "attention", "all"):
            found = logits(models.activate(tmp_path / folder))
        torch.testing.assert_close(found, logits(expected), atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(base.model), before)


def test_an_error_halfway_through_a_merge_leaves_no_trace(tmp_path, base, adapters, monkeypatch):
    before, calls, real = logits(base.model), [], torch.addmm
    write_variant(tmp_path / "v", MIXED, adapters, base, linear_shapes(base.model))

    def full(*args):
        calls.append(args)
        if len(calls) == 5:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args)

    with (
        pytest.raises(torch.OutOfMemoryError),
        monkeypatch.context() as patch,
        applied(base, "merged") as models,
    ):
        patch.setattr(torch, "addmm", full)
        models.activate(tmp_path / "v")
    assert len(calls) == 5 and torch.equal(logits(base.model), before)
    for how in ("merged", "beside"):  # nor does one while it is active
        with pytest.raises(RuntimeError, match="x"), active(base, tmp_path / "v", how):
            raise RuntimeError("x")
        assert torch.equal(logits(base.model), before)


def test_with_no_room_for_a_copy_variants_stay_beside(base, tiny_base, monkeypatch):
    for dtype, way in (("float32", Merged), ("bfloat16", Beside), ("float16", Beside)):  # which round the sum
        assert type(applied(load_base(str(tiny_base), "cpu", dtype))) is way
    size = 4 * sum(weight.numel() for weight in base.model.parameters())
    copied = 4 * sum(d_out * d_in for d_out, d_in in linear_shapes(base.model).values())
    for share, way in ((1, Beside), (1.5, Merged)):  # 0.7 of the first is too little
        memory = share * (size + copied)
        monkeypatch.setattr("router.model.apply.memory_bytes", lambda device, memory=memory: memory)
        assert isinstance(applied(base), way)
        assert isinstance(applied(base, "merged"), Merged) and isinstance(applied(base, "beside"), Beside)


def test_weights_that_are_quantised_are_not_merged_into(tmp_path, base, adapters):
    write_variant(tmp_path / "v", MIXED, adapters, base, linear_shapes(base.model))
    fresh = copy.deepcopy(base.model)
    small = fresh.get_submodule("model.layers.1.mlp.down_proj")
    small.weight = torch.nn.Parameter(small.weight.to(torch.float8_e4m3fn), requires_grad=False)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with (
        pytest.raises(InputError, match=r"float8_e4m3fn .*--apply beside"),
        applied(replace(base, model=fresh), "merged") as models,
    ):
        models.activate(tmp_path / "v")
    after = fresh.state_dict()
    assert all(torch.equal(value.float(), after[name].float()) for name, value in before.items())
