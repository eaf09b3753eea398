"""PEFT folders: what is read is what PEFT computes, what is written PEFT loads, the rest is refused."""

import json
import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import (
    WIDTHS,
    delta,
    edit_json,
    edit_weights,
    peft_deltas,
    plain_model,
    random_update,
    write_tiny_adapter,
)
from merge.factors import Factors
from merge.folders import CONFIG_FILE, WEIGHTS_FILE, AdapterError, open_adapter, served_rank, write_adapter

Q0 = "model.layers.0.self_attn.q_proj"


def change(folder, tensors=None, **config):
    """Rewrites parts of an adapter folder."""
    edit_json(folder / CONFIG_FILE, **config)
    if tensors is not None:
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS_FILE)


def loaded_by_peft(base_folder, adapter_folder):
    """The update of each module by PEFT's own loader; any warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True|Unexpected keyword arguments")
        return peft_deltas(plain_model(base_folder, adapter_folder))


def with_patterns(folder):
    """Ranks and alphas that differ by module; PEFT matches the patterns against the end of names."""
    ranks = {"mlp.down_proj": 3, "layers.0.self_attn.q_proj": 1}

    def cut(key, of):
        rank = next((rank for module, rank in ranks.items() if module in key), 4)
        return of[:rank] if "lora_A" in key else of[:, :rank]

    edit_weights(write_tiny_adapter(folder, 5, rank=4, alpha=6) / WEIGHTS_FILE, cut)
    alphas = {"mlp.down_proj": 12, r".*\.1\.self_attn\..*": 20}
    change(folder, rank_pattern={"down_proj": 3, "layers.0.self_attn.q_proj": 1}, alpha_pattern=alphas)


def tiny(seed, **how):
    return lambda folder: write_tiny_adapter(folder, seed, **how)


def in_bfloat16(folder):
    edit_weights(write_tiny_adapter(folder, 14, alpha=10) / WEIGHTS_FILE, lambda key, of: of.bfloat16())


# As PEFT is given where a few layers of a large model are trained.
NAMED = "|".join(
    rf"model\.layers\.\d{{1,2}}\.(mlp|self_attn)\.{kind}{n}_proj" for kind in "qk" for n in range(180)
)


KINDS = {
    "plain": tiny(1),
    "alpha": tiny(2, rank=4, alpha=10),
    "rslora": tiny(3, rank=4, alpha=10, use_rslora=True),
    "few_targets": tiny(4, kinds=("self_attn.v_proj", "mlp.up_proj")),
    "patterns": with_patterns,
    "rank_1": tiny(6, rank=1),
    "rank_512": tiny(7, rank=512, size=0.02, alpha=16),
    "fan_in_fan_out": tiny(8, fan_in_fan_out=True),  # nothing on Linear
    "some_layers": tiny(9, layers=(1,), layers_to_transform=[1]),
    "a_layer": tiny(10, layers=(1,), layers_to_transform=1, layers_pattern="layers"),
    "excluded": tiny(11, kinds=tuple(WIDTHS)[1:], target_modules="all-linear", exclude_modules=["q_proj"]),
    "capitals": tiny(18, target_modules="All-Linear"),
    "whole_names": tiny(
        19, kinds=("self_attn.q_proj",), target_modules=[Q0, Q0.replace("0", "1")], layers_to_transform=[0]
    ),
    "mica": tiny(12, init_lora_weights="mica"),
    "unknown_key": tiny(13, sent_by_a_later_version=True),
    "bfloat16": in_bfloat16,
    "a pattern": tiny(15, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj"),
    "a group and a set": tiny(17, target_modules=r".*\.(0|1)\d*\.(self|mlp)[_a-z]*\.\w+_proj"),
    "a long pattern": tiny(16, target_modules=rf"{NAMED}|[\w.]+\.(q|k|v|o|gate|up|down)_proj"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_read_is_what_peft_computes(tmp_path, tiny_base, kind):
    KINDS[kind](tmp_path / "a")
    adapter = open_adapter(tmp_path / "a")
    expected = loaded_by_peft(tiny_base, tmp_path / "a")
    found = dict(adapter.read_all())
    assert set(found) == set(expected) == set(adapter.ranks)
    for module, update in found.items():
        assert update.a.dtype == update.b.dtype == torch.float32
        np.testing.assert_allclose(delta(update), expected[module], atol=1e-5)
        np.testing.assert_array_equal(delta(dict(adapter.read_all([module]))[module]), delta(update))
        assert adapter.shapes[module] == expected[module].shape


def updates_of(ranks):
    return {
        f"model.layers.{layer}.{kind}": random_update(WIDTHS[kind][0], rank, WIDTHS[kind][1], seed)
        for seed, ((layer, kind), rank) in enumerate(ranks.items())
    }


EVEN = {(0, "self_attn.q_proj"): 3, (1, "self_attn.q_proj"): 9, (0, "mlp.up_proj"): 1, (1, "mlp.up_proj"): 2}
UNEVEN = {(0, "self_attn.q_proj"): 3, (1, "mlp.up_proj"): 5, (1, "self_attn.q_proj"): 2}


@pytest.mark.parametrize(
    ("ranks", "rank", "targets"),
    [
        (EVEN, 16, ["q_proj", "up_proj"]),
        (UNEVEN, 8, None),
        (dict.fromkeys(EVEN, 1), 1, ["q_proj", "up_proj"]),
    ],
)
def test_what_is_written_peft_loads_as_the_same_update(tmp_path, tiny_base, ranks, rank, targets):
    updates = updates_of(ranks)
    assert write_adapter(tmp_path / "out", updates, "some/base", "abc123") == rank
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "abc123")
    assert config["target_modules"] == (targets or sorted(updates))
    for key, value in load_file(tmp_path / "out" / WEIGHTS_FILE).items():
        assert value.shape["lora_B" in key] == rank
    again = open_adapter(tmp_path / "out")
    assert again.base_model == "some/base"
    for found in loaded_by_peft(tiny_base, tmp_path / "out"), {m: delta(f) for m, f in again.read_all()}:
        assert set(found) == set(updates)
        for module, update in updates.items():
            np.testing.assert_allclose(found[module], delta(update), atol=1e-5)
    served = {1: 1, 2: 8, 8: 8, 9: 16, 33: 64, 257: 320, 321: 512, 512: 512, 513: 513}
    assert {rank: served_rank(rank) for rank in served} == served


def test_small_updates_keep_their_digits_in_float16(tmp_path):
    """Below 6e-5 float16 has few: alpha / r as a factor of B would cost 4 % here."""
    updates = {
        "q": Factors(
            *(size * of for size, of in zip((0.03, 4e-7), random_update(48, 256, 32, 0), strict=True))
        )
    }
    updates["k"] = Factors(updates["q"].a.index_fill(0, torch.tensor([1]), 0), updates["q"].b)
    write_adapter(tmp_path, updates, "base", dtype=torch.float16)
    for module, found in open_adapter(tmp_path).read_all():
        expected = delta(updates[module])
        assert np.linalg.norm(delta(found) - expected) < 1e-3 * np.linalg.norm(expected)


DEEP = "(" * 5000 + "a" + ")" * 5000


def with_header(header):
    """Weights of 8 bytes behind a header that says something else."""
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


def tensor_of(shape, *offsets):
    return {f"base_model.model.{Q0}.lora_A.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}


def instead(name, make):
    """Something else in place of a file."""

    def spoil(folder):
        (folder / name).unlink()
        make(folder / name)

    return spoil


def changed(**config):
    return lambda folder: change(folder, **config)


A0, B0 = (f"base_model.model.{Q0}.lora_{half}.weight" for half in "AB")


def weights_with(make):
    """Changes the tensors of an adapter by `make(tensors)`, which gives those that are other."""

    def spoil(folder):
        tensors = load_file(folder / WEIGHTS_FILE)
        found = tensors | make(tensors)
        change(folder, {key: of for key, of in found.items() if of is not None})

    return spoil


def wide(folder, rank=2_000_000):
    """A file of holes whose header says that it has this rank."""
    half = 4 * 32 * rank
    header = tensor_of([rank, 32], 0, half) | {B0: tensor_of([32, rank], half, 2 * half)[A0]}
    (folder / WEIGHTS_FILE).write_bytes(with_header(header))
    os.truncate(folder / WEIGHTS_FILE, 8 + len(json.dumps(header)) + 2 * half)
    change(folder, r=rank)


# What spoils an adapter, the file that is named, and what is said of it.
REFUSED = {
    "a pattern that hangs": (changed(rank_pattern={"(.*?[a-z])" * 12 + "(?<=0)": 4}), "", ""),
    "gigabytes of holes": (lambda folder: os.truncate(folder / CONFIG_FILE, 3 << 30), CONFIG_FILE, "MiB"),
    "a rank of two_millions": (wide, WEIGHTS_FILE, f"{Q0}: "),
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), "", CONFIG_FILE),
    "link to itself": (instead(CONFIG_FILE, lambda at: at.symlink_to(at)), "", CONFIG_FILE),
    "pipe": (instead(CONFIG_FILE, os.mkfifo), "", CONFIG_FILE),
    **{
        f"config {text[:9]}": (lambda of, text=text: (of / CONFIG_FILE).write_text(text), CONFIG_FILE, "")
        for text in ("{'r': 4}", "[" * 100_000, "[1, 2]")
    },
    "no weights": (lambda folder: (folder / WEIGHTS_FILE).unlink(), "", WEIGHTS_FILE),
    "dangling link": (instead(WEIGHTS_FILE, lambda at: at.symlink_to("/nowhere")), "", WEIGHTS_FILE),
    "pipe of weights": (instead(WEIGHTS_FILE, os.mkfifo), "", WEIGHTS_FILE),
    "folder": (instead(WEIGHTS_FILE, Path.mkdir), "", WEIGHTS_FILE),
    "pickle": (
        instead(WEIGHTS_FILE, lambda at: at.with_name("adapter_model.bin").write_bytes(b"\x80\x04")),
        "", "the pickle adapter_model.bin",
    ),
    **{
        f"weights {n}": (lambda of, data=data: (of / WEIGHTS_FILE).write_bytes(data), WEIGHTS_FILE, "")
        for n, data in enumerate((
            b"", b"\xff" * 64, with_header(tensor_of([4], 0, 16)), with_header(tensor_of([3], 0, 8)),
            with_header(tensor_of([2], 0, 8) | {"b": tensor_of([2], 0, 8)[A0]}),  # overlapping
            with_header(tensor_of([1 << 40, 1 << 40], 0, 8)),
        ))
    },
    "truncated": (lambda folder: os.truncate(folder / WEIGHTS_FILE, 3000), WEIGHTS_FILE, ""),
    "no tensors": (weights_with(lambda of: dict.fromkeys(of)), WEIGHTS_FILE, ""),
    "fp8": (weights_with(lambda of: {A0: of[A0].to(torch.float8_e4m3fn)}), WEIGHTS_FILE, "F8_E4M3"),
    "int8": (weights_with(lambda of: {A0: of[A0].to(torch.int8)}), WEIGHTS_FILE, "I8"),
    "lone half": (weights_with(lambda of: {B0: None}), WEIGHTS_FILE, f"{Q0} has lora_A"),
    "halves": (weights_with(lambda of: {B0: torch.zeros(32, 5)}), WEIGHTS_FILE, "(32, 5)"),
    "twice": (
        weights_with(lambda of: {B0.removeprefix("base_model.model."): -of[B0]}), WEIGHTS_FILE, "lora_B",
    ),
    "conv": (weights_with(lambda of: {A0: torch.ones(4, 32, 3, 3)}), WEIGHTS_FILE, "(4, 32, 3, 3)"),
    **{
        name: (
            weights_with(lambda of, name=name: {f"base_model.model.{name}": torch.ones(32)}),
            WEIGHTS_FILE, name,
        )
        for name in (
            "lm_head.weight", f"{Q0}.lora_magnitude_vector", f"{Q0}.lora_B.bias",
            "model.embed_tokens.lora_embedding_A",
        )
    },
    **{
        f"{key} {value!r}"[:40]: (changed(**{key: value}), "", key)
        for key, value in (
            ("trainable_token_indices", [5]), ("use_dora", True), ("modules_to_save", ["lm_head"]),
            ("bias", "lora_only"), ("lora_bias", True), ("layer_replication", [[0, 1], [0, 1]]),
            *(("peft_type", kind.value) for kind in PeftType if kind != PeftType.LORA), ("peft_type", None),
            ("target_modules", ["q_proj"]), ("target_modules", 0),
        )
    },
    "other layers": (changed(layers_to_transform=[0]), "", "model.layers.1."),
    "excluded": (changed(exclude_modules=["q_proj"]), "", "q_proj"),
    "rank": (changed(r=8), "", f"rank 4 in {WEIGHTS_FILE} but 8 in {CONFIG_FILE}"),
    "rank pattern": (changed(rank_pattern={"q_proj": 2}), "", "self_attn.q_proj has rank 4"),
    **{
        f"{key} {value!r}"[:40]: (changed(**{key: value}), CONFIG_FILE, named)
        for key, value, named in (
            ("layers_to_transform", "all", "layers_to_transform"), ("layers_pattern", ["("], "'('"),
            ("target_modules", [1], "target_modules"), ("target_modules", "(", "'('"),
            ("rank_pattern", ["q"], "rank_pattern"), ("alpha_pattern", {"q": "8"}, "alpha_pattern of q"),
            *(("lora_alpha", of, "lora_alpha") for of in ("16", 0, None, True, math.nan, math.inf, 10**400)),
            # Patterns that take long to compile.
            ("alpha_pattern", {"(": 4}, ""), ("exclude_modules", DEEP, ""),
            ("layers_pattern", ["x", DEEP], ""),
            ("rank_pattern", {DEEP: 4}, ""), ("rank_pattern", {f"x{n}y+": 4 for n in range(4000)}, ""),
            ("target_modules", DEEP, ""), ("target_modules", "|".join(f"module{n}" for n in range(2000)), ""),
            ("target_modules", "x{99999999}", ""), ("target_modules", "(?:(?:ab){999}){999}", ""),
            ("target_modules", "(?:" * 40 + "a" + "b)+" * 40, ""),
            ("target_modules", "(?x)" + "(?:#)\n" * 40 + "a" + "b)+" * 40, ""),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_used_is_refused_by_name_and_cause(tmp_path, kind):
    folder = write_tiny_adapter(tmp_path / "my_adapter", 1)
    open_adapter(folder)  # it was sound
    spoil, file, cause = REFUSED[kind]
    spoil(folder)
    with pytest.raises(AdapterError) as caught:
        open_adapter(folder)
    where, _, _ = str(caught.value).partition(": ")
    assert where == str(folder / file)
    assert cause in str(caught.value)


@pytest.mark.parametrize(("old", "new"), [(".lora_A.", ".lora_A.default."), ("base_model.model.", "")])
def test_older_names_of_weights_mean_the_same(tmp_path, old, new):
    folder = write_tiny_adapter(tmp_path / "a", 1)
    expected = {module: delta(update) for module, update in open_adapter(folder).read_all()}
    change(folder, {key.replace(old, new, 1): of for key, of in load_file(folder / WEIGHTS_FILE).items()})
    for file in folder.iterdir():  # links are followed, as in the hub's cache
        (tmp_path / "snapshot").mkdir(exist_ok=True)
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    found = {module: delta(update) for module, update in open_adapter(tmp_path / "snapshot").read_all()}
    assert found.keys() == expected.keys()
    assert all((found[module] == expected[module]).all() for module in expected)


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_what_takes_a_part_out_of_the_base_can_be_converted(tmp_path, tiny_base, kind):
    model = plain_model(tiny_base)
    before = model.get_submodule(Q0).weight.double().detach().numpy().copy()
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=kind)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "initial")
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    layer = model.base_model.model.get_submodule(Q0)
    after = (layer.base_layer.weight + layer.get_delta_weight("default")).double().detach().numpy()
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(AdapterError, match=f"{kind}.*path_initial_model"):
        open_adapter(tmp_path / "trained")
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    found = delta(dict(open_adapter(tmp_path / "converted").read_all())[Q0])
    np.testing.assert_allclose(found, after - before, atol=1e-5)
