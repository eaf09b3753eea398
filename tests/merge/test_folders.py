"""PEFT folders: what is read is what PEFT computes, what is written PEFT loads, the rest is refused."""

import json
import math
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import WIDTHS, write_tiny_adapter
from merge.factors import Factors
from merge.folders import CONFIG_FILE, AdapterError, _Matcher, open_adapter, served_rank, write_adapter

Q0, DOWN1 = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def change(folder, tensors=None, **config):
    """Rewrites parts of an adapter folder."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if tensors is not None:
        save_file({key: value.contiguous() for key, value in tensors.items()}, weights_of(folder))


def weights_of(folder):
    return folder / "adapter_model.safetensors"


def with_patterns(folder):
    """Ranks and alphas that differ by module; PEFT matches the patterns against the end of names."""
    write_tiny_adapter(folder, 5, rank=4, alpha=6)
    tensors = load_file(weights_of(folder))
    for key, value in tensors.items():
        if "mlp.down_proj" in key:
            tensors[key] = value[:3] if "lora_A" in key else value[:, :3]
        if "layers.0.self_attn.q_proj" in key:
            tensors[key] = value[:1] if "lora_A" in key else value[:, :1]
    change(
        folder,
        tensors,
        rank_pattern={"layers.0.self_attn.q_proj": 1, "down_proj": 3},
        alpha_pattern={"mlp.down_proj": 12, r".*\.1\.self_attn\..*": 20},
    )


KINDS = {
    "plain": lambda folder: write_tiny_adapter(folder, 1),
    "alpha": lambda folder: write_tiny_adapter(folder, 2, rank=4, alpha=10),
    "rslora": lambda folder: write_tiny_adapter(folder, 3, rank=4, alpha=10, use_rslora=True),
    "few_targets": lambda folder: write_tiny_adapter(folder, 4, kinds=("self_attn.v_proj", "mlp.up_proj")),
    "patterns": with_patterns,
    "rank_1": lambda folder: write_tiny_adapter(folder, 6, rank=1),
    "rank_512": lambda folder: write_tiny_adapter(folder, 7, rank=512, size=0.02, alpha=16),
    "fan_in_fan_out": lambda folder: write_tiny_adapter(folder, 8, fan_in_fan_out=True),  # nothing on Linear
    "some_layers": lambda folder: write_tiny_adapter(folder, 9, layers=(1,), layers_to_transform=[1]),
    "a_layer": lambda folder: write_tiny_adapter(
        folder, 10, layers=(1,), layers_to_transform=1, layers_pattern="layers"
    ),
    "excluded": lambda folder: write_tiny_adapter(
        folder, 11, kinds=tuple(WIDTHS)[1:], target_modules="all-linear", exclude_modules=["q_proj"]
    ),
    "mica": lambda folder: write_tiny_adapter(folder, 12, init_lora_weights="mica"),
    "unknown_key": lambda folder: write_tiny_adapter(folder, 13, sent_by_a_later_version=True),
}


def peft_deltas(base_folder, adapter_folder):
    """The update of each module by PEFT's own loader; any warning is an error."""
    model = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to True|Unexpected keyword arguments")
        model = PeftModel.from_pretrained(model, adapter_folder)
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").double().numpy()
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def delta(factors):
    return factors.b.double().numpy() @ factors.a.double().numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_read_is_what_peft_computes(tmp_path, tiny_base, kind):
    KINDS[kind](tmp_path / "a")
    adapter = open_adapter(tmp_path / "a")
    expected = peft_deltas(tiny_base, tmp_path / "a")
    found = dict(adapter.read_all())
    assert set(found) == set(expected) == set(adapter.ranks)
    for module, update in found.items():
        np.testing.assert_allclose(delta(update), expected[module], atol=1e-5)
        np.testing.assert_array_equal(delta(adapter.read(module)), delta(update))
        assert adapter.shapes[module] == expected[module].shape


@pytest.mark.parametrize(
    ("kind", "module", "scale"),
    [
        ("plain", Q0, 1.0),
        ("alpha", Q0, 10 / 4),
        ("rslora", DOWN1, 10 / math.sqrt(4)),
        ("patterns", Q0, 6 / 1),
        ("patterns", DOWN1, 12 / 3),
        ("patterns", "model.layers.1.self_attn.q_proj", 20 / 4),
    ],
)
def test_read_is_scale_times_b_times_a(tmp_path, kind, module, scale):
    KINDS[kind](tmp_path / "a")
    tensors = load_file(weights_of(tmp_path / "a"))
    a, b = (tensors[f"base_model.model.{module}.lora_{x}.weight"].double().numpy() for x in "AB")
    found = open_adapter(tmp_path / "a").read(module)
    assert found.a.dtype == found.b.dtype == torch.float32
    np.testing.assert_allclose(delta(found), scale * (b @ a), atol=1e-5)


def test_half_precision_files_are_read_in_float32(tmp_path):
    write_tiny_adapter(tmp_path / "a", 1, alpha=3)
    tensors = {key: value.bfloat16() for key, value in load_file(weights_of(tmp_path / "a")).items()}
    change(tmp_path / "a", tensors)
    a, b = (tensors[f"base_model.model.{Q0}.lora_{x}.weight"].double() for x in "AB")
    found = open_adapter(tmp_path / "a").read(Q0)
    assert found.a.dtype == torch.float32
    np.testing.assert_allclose(delta(found), (b @ a * 0.75).numpy(), atol=1e-5)


def updates_of(ranks):
    rng = np.random.default_rng(0)
    return {
        f"model.layers.{layer}.{kind}": Factors(
            torch.tensor(rng.standard_normal((rank, WIDTHS[kind][1])), dtype=torch.float32),
            torch.tensor(rng.standard_normal((WIDTHS[kind][0], rank)), dtype=torch.float32),
        )
        for (layer, kind), rank in ranks.items()
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
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/base", "abc123")
    assert not config["rank_pattern"] and not config["alpha_pattern"] and not config["use_rslora"]
    assert config["target_modules"] == (targets or sorted(updates))
    for key, value in load_file(weights_of(tmp_path / "out")).items():
        assert value.shape["lora_B" in key] == rank
    found = peft_deltas(tiny_base, tmp_path / "out")
    assert set(found) == set(updates)
    for module, update in updates.items():
        np.testing.assert_allclose(found[module], delta(update), atol=1e-5)


def test_what_is_written_can_be_read_back(tmp_path):
    updates = updates_of(UNEVEN)
    write_adapter(tmp_path / "out", updates, "some/base", dtype=torch.bfloat16)
    assert {value.dtype for value in load_file(weights_of(tmp_path / "out")).values()} == {torch.bfloat16}
    adapter = open_adapter(tmp_path / "out")
    assert adapter.base_model == "some/base"
    for module, update in adapter.read_all():
        assert np.abs(delta(update) - delta(updates[module])).max() < 0.02 * np.abs(delta(update)).max()


def test_served_ranks():
    served = {1: 1, 2: 8, 8: 8, 9: 16, 33: 64, 257: 320, 321: 512, 512: 512, 513: 513}
    assert {rank: served_rank(rank) for rank in served} == served


def without_a_half(folder):
    tensors = load_file(weights_of(folder))
    del tensors[f"base_model.model.{Q0}.lora_B.weight"]
    change(folder, tensors)


def with_mismatching_halves(folder):
    tensors = load_file(weights_of(folder))
    tensors[f"base_model.model.{Q0}.lora_B.weight"] = torch.zeros(32, 5)
    change(folder, tensors)


def with_a_saved_head(folder):
    tensors = load_file(weights_of(folder))
    change(folder, tensors | {"base_model.model.lm_head.weight": torch.zeros(3, 3)})


def with_a_pickle_only(folder):
    weights_of(folder).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04never unpickled")


def with_tensor(name, tensor):
    """Adds a tensor to the weights, under a name in layer 0's attention."""
    key = f"base_model.model.model.layers.0.self_attn.{name}"
    return lambda folder: change(folder, load_file(weights_of(folder)) | {key: tensor})


def with_embeddings(folder):
    tensors = {f"base_model.model.model.embed_tokens.lora_embedding_{x}": torch.ones(4, 4) for x in "AB"}
    change(folder, load_file(weights_of(folder)) | tensors)


def in_bytes_of_8(folder):
    change(folder, {key: of.to(torch.float8_e4m3fn) for key, of in load_file(weights_of(folder)).items()})


def with_header(header):
    """Weights of 8 bytes behind a header that says something else."""
    text = json.dumps(header).encode()
    return lambda folder: weights_of(folder).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))


def tensor_of(shape, *offsets):
    return {f"base_model.model.{Q0}.lora_A.weight": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}


def instead(name, make):
    """Something else in place of a file."""

    def spoil(folder):
        (folder / name).unlink()
        make(folder / name)

    return spoil


def truncated(folder):
    data = weights_of(folder).read_bytes()
    weights_of(folder).write_bytes(data[: len(data) // 2])


def config_text(text):
    return lambda folder: (folder / "adapter_config.json").write_text(text)


def changed(**config):
    return lambda folder: change(folder, **config)


def with_whole_numbers(folder):
    tensors = load_file(weights_of(folder))
    change(folder, {key: tensor.to(torch.int8) for key, tensor in tensors.items()})


LIES = ("adapter_model.safetensors", "expected a complete safetensors file")
REFUSED = {
    "fp8": (in_bytes_of_8, "adapter_model.safetensors", "got F8_E4M3"),
    "magnitudes": (
        with_tensor("q_proj.lora_magnitude_vector", torch.ones(32)),
        "adapter_model.safetensors",
        "q_proj.lora_magnitude_vector",
    ),
    "bias_weights": (
        with_tensor("q_proj.lora_B.bias", torch.ones(32)),
        "adapter_model.safetensors",
        "lora_B.bias",
    ),
    "embeddings": (with_embeddings, "adapter_model.safetensors", "embed_tokens.lora_embedding_A"),
    "tokens": (changed(trainable_token_indices=[5]), "", "trainable_token_indices = [5]"),
    "conv": (
        with_tensor("q_proj.lora_A.weight", torch.ones(4, 32, 3, 3)),
        "adapter_model.safetensors",
        "of a linear layer, got (4, 32, 3, 3)",
    ),
    "other_layers": (changed(layers_to_transform=[0]), "", "holds weights of model.layers.1."),
    "excluded": (changed(exclude_modules=["q_proj"]), "", "which target_modules in"),
    "layers_text": (changed(layers_to_transform="all"), "adapter_config.json", "to be numbers, got 'all'"),
    "layers_pattern": (
        changed(layers_pattern=["("]),
        "adapter_config.json",
        "'(' is no regular expression",
    ),
    "longer_than_the_file": (with_header(tensor_of([4], 0, 16)), *LIES),
    "another_size": (with_header(tensor_of([3], 0, 8)), *LIES),
    "overlapping": (with_header(tensor_of([2], 0, 8) | {"b": tensor_of([2], 0, 8).popitem()[1]}), *LIES),
    "huge_shape": (with_header(tensor_of([1 << 40, 1 << 40], 0, 8)), *LIES),
    "huge_header": (lambda folder: weights_of(folder).write_bytes(b"\xff" * 64), *LIES),
    "deep": (config_text("[" * 100_000), "adapter_config.json", "expected JSON"),
    "dangling_link": (
        instead("adapter_model.safetensors", lambda at: at.symlink_to("/nowhere")),
        "",
        "no weights",
    ),
    "link_to_itself": (instead("adapter_config.json", lambda at: at.symlink_to(at)), "", "found none there"),
    "pipe": (instead("adapter_config.json", os.mkfifo), "", "with adapter_config.json, found none there"),
    "pipe_of_weights": (instead("adapter_model.safetensors", os.mkfifo), "", "found no weights"),
    "folder": (instead("adapter_model.safetensors", Path.mkdir), "", "found no weights"),
    "int8": (
        with_whole_numbers,
        "adapter_model.safetensors",
        "expected weights in F64, F32, F16, BF16, got I8",
    ),
    "untargeted": (
        changed(target_modules=["q_proj"]),
        "",
        "which target_modules in adapter_config.json leaves",
    ),
    "targets": (
        changed(target_modules=[1]),
        "adapter_config.json",
        "target_modules to be names or a pattern",
    ),
    "targets_number": (changed(target_modules=0), "", "target_modules"),
    "targets_pattern": (changed(target_modules="("), "adapter_config.json", "is no regular expression"),
    "pickle": (with_a_pickle_only, "", "only the pickle adapter_model.bin"),
    "no_weights": (lambda folder: weights_of(folder).unlink(), "", "found no weights"),
    "truncated": (truncated, "adapter_model.safetensors", "expected a complete safetensors file"),
    "empty_file": (
        lambda folder: weights_of(folder).write_bytes(b""),
        "adapter_model.safetensors",
        "expected a complete safetensors file",
    ),
    "no_tensors": (lambda folder: change(folder, {}), "adapter_model.safetensors", "the file holds none"),
    "no_config": (lambda folder: (folder / "adapter_config.json").unlink(), "", "with adapter_config.json"),
    "bad_json": (config_text("{'r': 4}"), "adapter_config.json", "expected JSON"),
    "no_object": (config_text("[1, 2]"), "adapter_config.json", "expected a JSON object, got a list"),
    "ia3": (changed(peft_type="IA3"), "", "got peft_type 'IA3'"),
    "no_type": (changed(peft_type=None), "", "got peft_type None"),
    "dora": (changed(use_dora=True), "", "use_dora = True"),
    "modules_to_save": (changed(modules_to_save=["lm_head"]), "", "modules_to_save = ['lm_head']"),
    "bias": (changed(bias="lora_only"), "", "bias = 'lora_only'"),
    "lora_bias": (changed(lora_bias=True), "", "lora_bias = True"),
    "replicated": (changed(layer_replication=[[0, 1], [0, 1]]), "", "layer_replication = "),
    "lone_half": (without_a_half, "adapter_model.safetensors", f"{Q0} has lora_A without its counterpart"),
    "halves": (with_mismatching_halves, "adapter_model.safetensors", "got (4, 32) and (32, 5)"),
    "saved_head": (with_a_saved_head, "adapter_model.safetensors", "got base_model.model.lm_head.weight"),
    "rank": (changed(r=8), "", "has rank 4 in adapter_model.safetensors but 8 in adapter_config.json"),
    "rank_pattern": (changed(rank_pattern={"q_proj": 2}), "", "self_attn.q_proj has rank 4"),
    "alpha_text": (changed(lora_alpha="16"), "adapter_config.json", "lora_alpha to be a positive number"),
    "alpha_zero": (changed(lora_alpha=0), "adapter_config.json", "a positive number, got 0"),
    "alpha_none": (changed(lora_alpha=None), "adapter_config.json", "a positive number, got None"),
    "alpha_true": (changed(lora_alpha=True), "adapter_config.json", "a positive number, got True"),
    "alpha_nan": (changed(lora_alpha=math.nan), "adapter_config.json", "a positive number, got nan"),
    "alpha_endless": (changed(lora_alpha=math.inf), "adapter_config.json", "a positive number, got inf"),
    "alpha_huge": (changed(lora_alpha=10**400), "adapter_config.json", "a positive number, got 1000"),
    "alpha_pattern": (changed(alpha_pattern={"q": "8"}), "adapter_config.json", "alpha_pattern of q to be"),
    "pattern_list": (changed(rank_pattern=["q"]), "adapter_config.json", "rank_pattern to be a JSON object"),
}


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


@pytest.mark.parametrize("kind", [kind.value for kind in PeftType if kind != PeftType.LORA])
def test_other_types_of_peft_are_refused_by_name(tmp_path, kind):
    folder = write_tiny_adapter(tmp_path / "a", 1, peft_type=kind)
    with pytest.raises(AdapterError, match=f"peft_type '{kind}'"):
        open_adapter(folder)


@pytest.mark.parametrize("old, new", [(".lora_A.", ".lora_A.default."), ("base_model.model.", "")])
def test_older_names_of_weights_mean_the_same(tmp_path, old, new):
    folder = write_tiny_adapter(tmp_path / "a", 1)
    expected = {module: delta(update) for module, update in open_adapter(folder).read_all()}
    weights = load_file(weights_of(folder))
    save_file({key.replace(old, new, 1): value for key, value in weights.items()}, weights_of(folder))
    found = {module: delta(update) for module, update in open_adapter(folder).read_all()}
    assert found.keys() == expected.keys()
    assert all((found[module] == expected[module]).all() for module in expected)


def test_links_are_followed_as_in_the_hubs_cache(tmp_path):
    store = write_tiny_adapter(tmp_path / "blobs", 1)
    (tmp_path / "snapshot").mkdir()
    for file in store.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert open_adapter(tmp_path / "snapshot").ranks == open_adapter(store).ranks


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model")
@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_what_takes_a_part_out_of_the_base_is_converted_as_the_message_says(tmp_path, tiny_base, kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    before = model.get_submodule(Q0).weight.double().detach().numpy().copy()
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=kind)
    )
    model.save_pretrained(tmp_path / "initial")
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data += 0.1 * torch.randn_like(weight)
    layer = model.base_model.model.get_submodule(Q0)
    after = (layer.base_layer.weight + layer.get_delta_weight("default")).double().detach().numpy()
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(AdapterError, match=f"{kind}.*path_initial_model_for_weight_conversion=INITIAL"):
        open_adapter(tmp_path / "trained")
    initial = str(tmp_path / "initial")
    model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=initial)
    np.testing.assert_allclose(
        delta(open_adapter(tmp_path / "converted").read(Q0)), after - before, atol=1e-5
    )


def test_harmless_settings_pass(tmp_path):
    folder = write_tiny_adapter(
        tmp_path / "a", 1, use_dora=None, modules_to_save=[], lora_bias=False, bias="none"
    )
    assert len(open_adapter(folder).ranks) == 14
    assert open_adapter(folder).base_model == "tiny"


def test_a_pattern_that_hangs_its_reader_is_given_up(tmp_path):
    folder = write_tiny_adapter(tmp_path / "slow", 1, rank_pattern={"(.*?[a-z])" * 12 + "(?<=0)": 4})
    with pytest.raises(AdapterError, match=f"{folder}: .*takes too long"):
        open_adapter(folder)


def test_many_slow_patterns_are_given_up_together(tmp_path, monkeypatch):
    folder = write_tiny_adapter(tmp_path / "slow", 1, alpha_pattern={"x+": 1, "y+": 2})
    clock = iter(range(10**6))
    monkeypatch.setattr("merge.folders.time.monotonic", lambda: next(clock) / 20)  # 28 matches, 0.05 s each
    open_adapter(folder)
    monkeypatch.setattr("merge.folders.time.monotonic", lambda: next(clock) / 10)
    with pytest.raises(AdapterError, match="takes too long"):
        open_adapter(folder)


def test_a_configuration_of_gigabytes_is_refused_unread(tmp_path):
    folder = write_tiny_adapter(tmp_path / "sparse", 1)
    with (folder / CONFIG_FILE).open("r+b") as file:
        file.truncate(3 << 30)  # of holes
    with pytest.raises(AdapterError, match=f"{CONFIG_FILE}: .*4 MiB"):
        open_adapter(folder)


def test_a_rank_of_two_millions_is_refused_unread(tmp_path):
    folder, rank = write_tiny_adapter(tmp_path / "wide", 1, r=2_000_000), 2_000_000
    shapes = {"A": [rank, 32], "B": [32, rank]}
    header, size = {}, 0
    for letter, shape in shapes.items():
        end = size + 4 * math.prod(shape)
        tensor = {"dtype": "F32", "shape": shape, "data_offsets": [size, end]}
        header[f"base_model.model.{Q0}.lora_{letter}.weight"], size = tensor, end
    with_header(header)(folder)
    with weights_of(folder).open("r+b") as file:
        file.truncate(8 + len(json.dumps(header)) + size)
    with pytest.raises(AdapterError, match=f"{Q0}: .*{rank}"):
        open_adapter(folder)


# As PEFT is given where a few layers of a large model are trained.
NAMED = "|".join(
    rf"model\.layers\.\d{{1,2}}\.(mlp|self_attn)\.{kind}{n}_proj" for kind in "qk" for n in range(180)
)


@pytest.mark.parametrize(
    "targets",
    ["all-linear", r".*\.(q|k|v|o|gate|up|down)_proj", None, rf"{NAMED}|[\w.]+\.(q|k|v|o|gate|up|down)_proj"],
)
def test_targets_may_be_all_or_a_pattern(tmp_path, targets):
    assert len(open_adapter(write_tiny_adapter(tmp_path / "a", 1, target_modules=targets)).ranks) == 14


def test_what_is_too_large_for_its_dtype_is_not_written(tmp_path):
    update = Factors(torch.ones(1, 3), torch.full((2, 1), 1e6))
    write_adapter(tmp_path / "fits", {Q0: update}, "tiny", dtype=torch.bfloat16)
    with pytest.raises(OverflowError, match=r"torch\.float16"):
        write_adapter(tmp_path / "not", {Q0: update}, "tiny", dtype=torch.float16)
    assert not (tmp_path / "not").exists()


DEEP = "(" * 5000 + "a" + ")" * 5000


@pytest.mark.parametrize(
    "config",
    [
        {"alpha_pattern": {"(": 4}},
        {"target_modules": DEEP},
        {"exclude_modules": DEEP},
        {"layers_pattern": ["x", DEEP]},
        {"rank_pattern": {DEEP: 4}},
        {"alpha_pattern": {DEEP: 4}},
        {"rank_pattern": {f"x{n}y+": 4 for n in range(4000)}},
        *(
            {"target_modules": pattern}
            for pattern in (
                "|".join(f"module{n}" for n in range(2000)),
                "x{99999999}",
                "(?:(?:ab){999}){999}",
                "(?:" * 40 + "a" + "b)+" * 40,
                "(?x)" + "(?: " * 40 + "a" + r"\([)]b) { 1,2}" * 40,
                "(?x)" + "(?:#)\n" * 40 + "a" + "b)+" * 40,
                "(?:" * 40 + "a" + "b)(?#)+" * 40,
            )
        ),
    ],
)
def test_patterns_that_take_long_to_compile_are_refused(tmp_path, config):
    with pytest.raises(AdapterError, match=CONFIG_FILE):
        open_adapter(write_tiny_adapter(tmp_path / "odd", 1, **config))


@pytest.mark.parametrize(
    "name", ["layers.1.self_attn.q_proj", "q_proj", "layers.11.q_proj", "a", "x.q_projx"]
)
def test_a_name_as_a_pattern_is_matched_as_peft_does(name):
    patterns = [
        "q_proj",
        "layers.1.self_attn.q_proj",
        "1.self_attn.q_proj",
        "1.q_proj",
        "self_attn",
        "proj",
        ".",
        "",
    ]
    patterns += ["layers.1", "layers.1.q_proj", "q.proj", "[q]_proj", r"layers\.\d+\.q_proj"]
    for pattern in patterns:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None  # peft.utils.get_pattern_key
        assert (_Matcher().by_pattern({pattern: 1}, name, 0) == 1) == expected, pattern


def test_an_adapter_with_a_pattern_for_each_module_needs_no_regular_expressions(tmp_path, monkeypatch):
    folder = write_tiny_adapter(tmp_path / "each", 1)
    modules = list(open_adapter(folder).ranks)
    config = json.loads((folder / CONFIG_FILE).read_text())
    config |= {
        "rank_pattern": dict.fromkeys(modules, 4),
        "alpha_pattern": {m: n for n, m in enumerate(modules, 1)},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"r": 9}))
    monkeypatch.setattr(_Matcher, "match", lambda *_: pytest.fail("slow"))
    found = open_adapter(folder)
    assert [found.scale(module) for module in modules] == [n / 4 for n in range(1, len(modules) + 1)]


def test_two_tensors_for_one_factor_are_refused(tmp_path):
    folder = write_tiny_adapter(tmp_path / "twice", 1)
    weights = load_file(folder / "adapter_model.safetensors")
    key = next(key for key in weights if "lora_B" in key)
    weights[key.removeprefix("base_model.model.")] = -weights[key]
    save_file(weights, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors: .*lora_B"):
        open_adapter(folder)
