"""The base model: refused where it is damaged or brings code, whole otherwise."""

import hashlib
import json
import shutil
from unittest.mock import patch

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

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


def test_a_weight_that_is_not_finite_is_named(copied):
    name = "model.layers.1.mlp.up_proj.weight"
    spoilt(copied, lambda tensors: tensors[name][0, 0].fill_(torch.nan))
    with pytest.raises(InputError, match=name):
        load_base(str(copied), "cpu", "float32")


def test_activations_that_overflow_are_told_from_damaged_weights(copied):
    def grow(tensors):
        for kind in ("up_proj", "down_proj"):
            tensors[f"model.layers.0.mlp.{kind}.weight"].mul_(1e4)

    spoilt(copied, grow)
    load_base(str(copied), "cpu", "float32")
    with pytest.raises(InputError, match="--dtype float32"):
        load_base(str(copied), "cpu", "float16")


def test_truncated_weights_are_refused_in_a_sentence(copied):
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(str(copied), "cpu", "float32")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_are_missing_are_named_and_not_drawn(copied, name):
    spoilt(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(InputError, match=f"{copied}: .*{name}"):
        load_base(str(copied), "cpu", "float32")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"hidden_size": "x"}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"dtype": "float99"}),
        ("config.json", None),
        ("tokenizer_config.json", None),
        ("generation_config.json", []),
    ],
)
def test_a_damaged_configuration_is_refused_in_a_sentence(copied, name, change):
    old = json.loads((copied / name).read_text())
    (copied / name).write_text(json.dumps(old | change if isinstance(change, dict) else change))
    with pytest.raises(InputError, match=f"--base_model {copied}: "):
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
    config = json.loads((copied / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {
        "AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}  # fmt: skip
    (copied / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_base(str(copied), "cpu", "float32")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_embedded_model_is_converted_again(tiny_base, tmp_path, monkeypatch):
    folder = tmp_path / "converted"

    def convert():
        if not folder.is_dir():
            shutil.copytree(tiny_base, folder)
        return folder

    monkeypatch.setattr(module, "embedded_folder", convert)
    (convert() / "model.safetensors").write_bytes(b"")
    tokenizer, model = module._read(folder, torch.float32, again=True)
    assert model.num_parameters() > 0 and tokenizer("a")["input_ids"]
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SafetensorError):
        module._read(folder, torch.float32)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_weights_that_are_replaced_while_read_are_refused(copied, tmp_path, monkeypatch, moment):
    """Else what is computed from one model would be kept under the hash of another, for good."""
    other = shutil.copytree(copied, tmp_path / "other")
    spoilt(other, lambda tensors: tensors["lm_head.weight"].mul_(2))
    read = module._read

    def replaced(*args, **places):
        if moment == "before":
            (other / "model.safetensors").replace(copied / "model.safetensors")
        found = read(*args, **places)
        if moment == "after":
            (other / "model.safetensors").replace(copied / "model.safetensors")
        return found

    monkeypatch.setattr(module, "_read", replaced)
    with pytest.raises(InputError, match=f"--base_model {copied}: .*changed"):
        load_base(str(copied), "cpu", "float32")
    monkeypatch.undo()
    load_base(str(copied), "cpu", "float32")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json"])
def test_so_is_a_model_whose_other_files_are_replaced(copied, monkeypatch, name):
    read = module._read

    def replaced(*args, **places):
        (copied / "new").write_text((copied / name).read_text() + "\n")
        (copied / "new").replace(copied / name)
        return read(*args, **places)

    monkeypatch.setattr(module, "_read", replaced)
    with pytest.raises(InputError, match="changed while it was read"):
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
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"transformers_weights": "own.safetensors"}))
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
