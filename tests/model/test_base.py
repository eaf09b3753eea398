"""The base model: refused where it is damaged or brings code, whole otherwise."""

import hashlib
import json
import shutil
from unittest.mock import patch

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import edit_json
from router.model import base as module
from router.model.base import embedded_folder, load_base
from router.system.errors import InputError


@pytest.fixture()
def copied(tiny_base, tmp_path):
    return shutil.copytree(tiny_base, tmp_path / "base")


def spoilt(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_overflows_are_told_from_damaged_weights(copied):
    def grow(tensors):
        for kind in ("up_proj", "down_proj"):
            tensors[f"model.layers.0.mlp.{kind}.weight"].mul_(1e4)

    spoilt(copied, grow)
    load_base(str(copied), "cpu", "float32")
    with pytest.raises(InputError, match="--dtype float32"):
        load_base(str(copied), "cpu", "float16")


UP = "model.layers.1.mlp.up_proj.weight"


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def config(name, change):
    """Changes fields of a JSON file, or all of it."""

    def spoil(folder):
        if isinstance(change, dict):
            edit_json(folder / name, **change)
        else:
            (folder / name).write_text(json.dumps(change))

    return spoil


# How the folder of a base model is damaged, and what is named beside it.
DAMAGED = {
    "not finite": (lambda folder: spoilt(folder, lambda tensors: tensors[UP][0, 0].fill_(torch.nan)), UP),
    "missing": (lambda folder: spoilt(folder, lambda tensors: tensors.pop(UP)), UP),
    "missing head": (lambda folder: spoilt(folder, lambda of: of.pop("lm_head.weight")), "lm_head.weight"),
    "truncated": (truncate, ""),
    "a text for a size": (config("config.json", {"hidden_size": "x"}), ""),
    "no heads": (config("config.json", {"num_attention_heads": 0}), ""),
    "no such dtype": (config("config.json", {"dtype": "float99"}), ""),
    "no configuration": (config("config.json", None), ""),
    "no tokenizer's": (config("tokenizer_config.json", None), ""),
    "a list for generation": (config("generation_config.json", []), ""),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_missing_truncated_or_damaged_weights_or_configuration(copied, kind):
    spoil, named = DAMAGED[kind]
    spoil(copied)
    with pytest.raises(InputError, match=f"--base_model {copied}: .*{named}"):
        load_base(str(copied), "cpu", "float32")


def test_a_model_that_does_not_read_tokens_alone_is_refused(copied):
    error = IndexError("index out of range")
    with (
        patch("transformers.LlamaForCausalLM.forward", side_effect=error),
        pytest.raises(InputError, match="LlamaForCausalLM"),
    ):
        load_base(str(copied), "cpu", "float32")


def test_a_models_own_code_is_refused_without_a_question(copied, tmp_path, monkeypatch):
    (copied / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    code = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    edit_json(copied / "config.json", model_type="theirs", auto_map=code)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(str(copied), "cpu", "float32")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_embedded_model_says_what_to_remove(tiny_base, copied, monkeypatch):
    (copied / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(module, "embedded_folder", lambda: copied)
    monkeypatch.setattr(module, "embedded_gguf", lambda: tiny_base / "model.safetensors")
    with pytest.raises(InputError, match=f"{copied}: .*remove that folder"):
        load_base("embedded", "cpu", "float32")


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"]
)
def test_a_file_that_is_replaced_while_read_is_refused(copied, tmp_path, monkeypatch, name, moment):
    """Else what is computed from one model would be kept under the hash of another, for good."""
    other = shutil.copytree(copied, tmp_path / "other")
    spoilt(other, lambda tensors: tensors["lm_head.weight"].mul_(2))
    for file in other.glob("*.json"):
        file.write_text(file.read_text() + "\n")
    read = module._read

    def replaced(*args, **places):
        if moment == "before":
            (other / name).replace(copied / name)
        found = read(*args, **places)
        if moment == "after":
            (other / name).replace(copied / name)
        return found

    with monkeypatch.context() as patched:
        patched.setattr(module, "_read", replaced)
        with pytest.raises(InputError, match=f"--base_model {copied}: .*changed"):
            load_base(str(copied), "cpu", "float32")
    load_base(str(copied), "cpu", "float32")


def sha256(*files):
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@pytest.fixture()
def shards(tiny_base, tmp_path):
    """A folder whose weights are in several files."""
    folder = shutil.copytree(tiny_base, tmp_path / "shards")
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(tiny_base).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_the_weights_are_those_of_the_files_that_are_read(copied, shards):
    """Damaged files beside them would be an error if they were read."""
    files = sorted(shards.glob("*.safetensors"))
    for folder in (copied, shards):
        (folder / "consolidated.safetensors").write_bytes(b"damaged")
    assert load_base(str(shards), "cpu", "float32").sha256 == sha256(*files)
    for file in files:
        (copied / file.name).write_bytes(b"damaged")
    shutil.copy(shards / "model.safetensors.index.json", copied)
    assert load_base(str(copied), "cpu", "float32").sha256 == sha256(copied / "model.safetensors")


def test_a_configuration_may_name_the_weights(copied):
    edit_json(copied / "config.json", transformers_weights="own.safetensors")
    (copied / "model.safetensors").rename(copied / "own.safetensors")
    (copied / "model.safetensors").write_bytes(b"damaged")
    assert load_base(str(copied), "cpu", "float32").sha256 == sha256(copied / "own.safetensors")


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


def test_a_model_replaced_while_it_is_converted_is_not_kept(tmp_path, monkeypatch):
    gguf, cache = tmp_path / "model.gguf", tmp_path / "cache"
    gguf.write_bytes(b"one")

    def converted(_, folder):
        (folder / "model.safetensors").write_bytes(gguf.read_bytes())
        gguf.write_bytes(b"another")

    monkeypatch.setattr(module, "embedded_gguf", lambda: gguf)
    monkeypatch.setattr(module, "cache_folder", lambda: cache)
    monkeypatch.setattr(module, "convert", converted)
    with pytest.raises(InputError, match=f"{gguf}: "):
        embedded_folder()
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTO_ROUTE_CACHE", str(tmp_path))
    for error in (PermissionError(13, "Permission denied"), OSError(30, "Read-only file system")):
        with (
            patch.object(module.tempfile, "mkdtemp", side_effect=error),
            pytest.raises(InputError, match="PROTO_ROUTE_CACHE"),
        ):
            embedded_folder()
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROTO_ROUTE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="PROTO_ROUTE_CACHE"):
        embedded_folder()
