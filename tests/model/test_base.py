"""The base model: refused where it is damaged or brings code, whole otherwise."""

import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from transformers import AutoModelForCausalLM

from helpers import edit_json, edit_weights, family, write_tiny_adapter
from router.model import base as module
from router.model.base import decoder_prefix, embedded_folder, linear_shapes, load_base
from router.system.errors import InputError
from router.system.files import sha256_of


@pytest.fixture()
def copied(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def with_weights(name, change):
    """Changes one tensor of a base model; None leaves it out."""
    return lambda folder: edit_weights(
        folder / "model.safetensors", lambda key, of: change(of) if name in key else of
    )


UP, HEAD = "model.layers.1.mlp.up_proj.weight", "lm_head.weight"
# How the folder of a base model is damaged, and what is named beside it.
DAMAGED = {
    "not finite": (with_weights(UP, lambda of: of.index_fill(0, torch.tensor(0), torch.nan)), UP),
    "missing": (with_weights(UP, lambda of: None), UP),
    "missing head": (with_weights(HEAD, lambda of: None), HEAD),
    "beside an adapter": (lambda folder: write_tiny_adapter(folder, 5), "adapter_config.json"),
    "truncated": (lambda folder: os.truncate(folder / "model.safetensors", 1000), ""),
    **{
        f"{part}": (lambda folder, part=part: edit_json(folder / "config.json", **part), "")
        for part in ({"hidden_size": "x"}, {"num_attention_heads": 0}, {"dtype": "float99"})
    },
    **{
        f"{name} {text}": (lambda folder, name=name, text=text: (folder / name).write_text(text), "")
        for name, text in (
            ("config.json", "null"), ("tokenizer_config.json", "null"), ("generation_config.json", "[]"),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGED)
def test_missing_truncated_or_damaged_weights_or_configuration(copied, kind):
    spoil, named = DAMAGED[kind]
    spoil(copied)
    with pytest.raises(InputError, match=f"--base_model {copied}: .*{named}"):
        load_base(str(copied), "cpu", "float32")


def test_a_model_that_cannot_be_used_is_told_from_a_damaged_one(copied, monkeypatch):
    with (
        patch("transformers.LlamaForCausalLM.forward", side_effect=IndexError("index out of range")),
        pytest.raises(InputError, match="LlamaForCausalLM"),  # which does not read tokens alone
    ):
        load_base(str(copied), "cpu", "float32")

    for kind in ("up_proj", "down_proj"):
        with_weights(f"layers.0.mlp.{kind}", lambda of: 1e4 * of)(copied)
    load_base(str(copied), "cpu", "float32")
    with pytest.raises(InputError, match="--dtype float32"):
        load_base(str(copied), "cpu", "float16")
    (copied / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(module, "embedded_folder", lambda: copied)
    monkeypatch.setattr(module, "embedded_gguf", lambda: copied / "config.json")
    with pytest.raises(InputError, match=str(copied)):  # which is to be removed
        load_base("embedded", "cpu", "float32")


def test_a_models_own_code_is_refused_without_a_question(copied, tmp_path, monkeypatch):
    (copied / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    edit_json(copied / "config.json", model_type="theirs", auto_map=code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match=str(copied)):
        load_base(str(copied), "cpu", "float32")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_file_that_is_replaced_while_read_is_refused(copied, tmp_path, monkeypatch, name, moment):
    """Else what is computed from one model would be kept under the hash of another, for good."""
    other = shutil.copytree(copied, tmp_path / "other")
    with_weights(HEAD, lambda of: 2 * of)(other)
    for file in other.glob("*.json"):
        file.write_text(file.read_text() + "\n")
    read = module.read

    def replaced(*args, **places):
        if moment == "before":
            (other / name).replace(copied / name)
        found = read(*args, **places)
        if moment == "after":
            (other / name).replace(copied / name)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(module, "read", replaced)
        with pytest.raises(InputError, match=f"--base_model {copied}: .*changed"):
            load_base(str(copied), "cpu", "float32")
    load_base(str(copied), "cpu", "float32")


def test_the_weights_are_those_of_the_files_that_are_read(copied, tiny_base, tmp_path):
    """Damaged files beside them would be an error if they were read."""
    shards = shutil.copytree(tiny_base, tmp_path / "shards")
    (shards / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(shards, max_shard_size="40KB")
    files = sorted(shards.glob("*.safetensors"))
    assert len(files) > 1
    for folder in (copied, shards):
        (folder / "consolidated.safetensors").write_bytes(b"damaged")
    assert load_base(str(shards), "cpu", "float32").sha256 == sha256_of(*files)
    for file in files:
        (copied / file.name).write_bytes(b"damaged")
    shutil.copy(shards / "model.safetensors.index.json", copied)
    whole = sha256_of(copied / "model.safetensors")
    assert load_base(str(copied), "cpu", "float32").sha256 == whole
    edit_json(copied / "config.json", transformers_weights="own.safetensors")  # it may name them
    (copied / "model.safetensors").rename(copied / "own.safetensors")
    (copied / "model.safetensors").write_bytes(b"damaged")
    assert load_base(str(copied), "cpu", "float32").sha256 == whole


def test_of_a_repository_only_what_is_read_is_fetched(monkeypatch, tmp_path):
    wanted = {"config.json", "model-1.safetensors", "model.safetensors.index.json", "tokenizer.model"}
    others = {"README.md", "consolidated.safetensors", "consolidated-1.safetensors", "pytorch_model.bin"}
    asked = []

    def download(name, **how):
        patterns = {key: of for key, of in how.items() if key.endswith("_patterns")}
        asked.append((set(filter_repo_objects(wanted | others, **patterns)), how["local_files_only"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for local_only in (False, True):
        module.fetched("some/model", local_only)
    assert asked == [(wanted, False), (wanted, True)]


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", Path("/proc/nothing")):
        monkeypatch.setenv("PROTO_ROUTE_CACHE", str(place))
        with pytest.raises(InputError, match="PROTO_ROUTE_CACHE"):
            embedded_folder()


def test_the_converted_model_has_the_rights_that_the_umask_leaves(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("PROTO_ROUTE_CACHE", str(tmp_path / "cache"))  # which users may share
    monkeypatch.setattr(module, "embedded_gguf", lambda: tiny_base / "config.json")
    monkeypatch.setattr(module, "convert", lambda _, to: shutil.copytree(tiny_base, to, dirs_exist_ok=True))
    old = os.umask(0o022)
    try:
        folder = embedded_folder()
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o755
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


@pytest.mark.parametrize(("kind", "prefix"), [("llama", "model."), ("gemma3", "model.language_model.")])
def test_what_reads_text_is_known_and_what_chooses_experts_takes_no_adapter(kind, prefix):
    model = family(kind, 64)
    assert decoder_prefix(model) == prefix
    name = f"{prefix}layers.1.self_attn.q_proj"
    assert name in linear_shapes(model)
    chooses = type("TopRouter", (torch.nn.Linear,), {})(32, 4)
    model.set_submodule(name, chooses)
    assert name not in linear_shapes(model) and prefix + "layers.0.self_attn.q_proj" in linear_shapes(model)
