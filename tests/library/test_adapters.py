"""The library: found where it is said to be, sound, of one base model."""

import errno
import os
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from helpers import WIDTHS, write_tiny_adapter
from router.library.adapters import base_of, check_against_base, last_block, load_library
from router.library.sources import is_here
from router.routing.prototypes import prototypes
from router.system.errors import InputError

SHAPES = {f"model.layers.{layer}.{kind}": shape for layer in range(2) for kind, shape in WIDTHS.items()}


def names(specs):
    return [adapter.name for adapter in load_library([str(spec) for spec in specs])]


def test_folders_come_in_the_order_given_and_those_inside_by_name(tiny_library, monkeypatch):
    (tiny_library / ".cache").mkdir()
    (tiny_library / "README.md").write_text("not an adapter")
    assert names([tiny_library]) == ["attention", "everything", "mlp"]
    assert names([tiny_library / "mlp", f"{tiny_library}/attention/"]) == ["mlp", "attention"]
    (tiny_library / "link").symlink_to(tiny_library / "mlp")
    assert names([tiny_library / "link"]) == ["link"]
    with monkeypatch.context() as patch:
        patch.setattr("router.library.sources.LIBRARY", tiny_library)  # where names are looked up
        assert names(["mlp", "everything"]) == ["mlp", "everything"]
    (tiny_library / "half").mkdir()
    for broken in (tiny_library / "half", tiny_library / ".cache"):
        with pytest.raises(InputError, match=str(broken)):
            load_library([str(broken)])
    (tiny_library / "everything" / "inside").mkdir()
    monkeypatch.chdir(tiny_library / "everything")
    assert names(["."]) == names(["inside/.."]) == ["everything"]


BAD = {
    "broken": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"),
    "dora": lambda folder: write_tiny_adapter(folder, 4, use_dora=True),
    "id": lambda folder: None,
    "infinite": lambda folder: write_tiny_adapter(folder, 4, size=1e30),
    "large": lambda folder: write_tiny_adapter(folder, 4, size=1e25),  # for float32 to multiply
    "zero": lambda folder: write_tiny_adapter(folder, 4, size=0.0),
}


def test_bad_adapters_are_left_out_and_listed_if_asked_for(tiny_library):
    for name, spoil in BAD.items():
        spoil(write_tiny_adapter(tiny_library / name, 4))
    bad = []
    specs = [str(tiny_library), str(tiny_library / "mlp"), "no/such/adapter"]
    found = load_library(specs, local_only=True, bad=bad)
    assert [adapter.name for adapter in found] == ["attention", "everything", "mlp"]
    named = [*(str(tiny_library / name) for name in sorted(BAD)), str(tiny_library / "mlp"), specs[-1]]
    assert len(bad) == len(named) and all(name in line for name, line in zip(named, bad, strict=True))
    other = {module: shape for module, shape in SHAPES.items() if "mlp" not in module}
    (attention,) = check_against_base(found, "tiny", True, other, bad := [])
    assert attention.name == "attention" and len(bad) == 2
    with pytest.raises(InputError, match=r"--skip_bad: .*zero"):
        load_library([str(tiny_library / "zero")], bad=[])


@pytest.mark.parametrize(
    ("call", "file"), [("exists", "adapter_config.json"), ("iterdir", ""), ("is_dir", "mlp")]
)
def test_a_folder_that_cannot_be_read_is_refused_in_a_sentence(tiny_library, monkeypatch, call, file):
    usual = getattr(Path, call)

    def called(path):
        if path == tiny_library / file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(Path, call, called)
    with pytest.raises(InputError, match=f"--adapters {tiny_library}: .*Permission denied"):
        load_library([str(tiny_library)])
    bad = []  # with --skip_bad it is left out
    (one,) = load_library([str(tiny_library / "attention"), str(tiny_library)], bad=bad)
    assert one.name == "attention" and len(bad) == 1


def test_a_link_to_nowhere_is_named(tiny_library):
    (tiny_library / "README.md").symlink_to(
        tiny_library / "mlp" / "adapter_config.json"
    )  # as the hub keeps files
    assert len(load_library([str(tiny_library)])) == 3
    (tiny_library / "legal").symlink_to(tiny_library / "gone")
    with pytest.raises(InputError, match="legal"):
        load_library([str(tiny_library)])


def test_the_default_library_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("router.library.sources.fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="--adapters data/library"):
        load_library(["data/library"])


def test_weights_replaced_after_opening_do_not_reach_the_cache(tmp_path, cache):
    folder, other = (write_tiny_adapter(tmp_path / name, 1) for name in ("one", "other"))
    (adapter,) = load_library([str(folder)])
    write_tiny_adapter(folder, 2)
    with pytest.raises(InputError, match="adapter one "):
        prototypes([adapter])
    found = (prototypes(load_library([str(of)])) for of in (folder, other))
    one, two = (of["model.layers.0.mlp.up_proj"].directions for of in found)
    assert not torch.equal(one, two)


@pytest.mark.parametrize(
    "spoilt", [Path.unlink, lambda file: os.truncate(file, 3000), lambda file: save_file({}, file)],
    ids=["gone", "truncated", "others"],
)  # fmt: skip
def test_weights_that_vanish_after_the_check_are_named(tiny_library, spoilt):
    (adapter,) = load_library([str(tiny_library / "mlp")])
    spoilt(tiny_library / "mlp" / "adapter_model.safetensors")
    for read in (lambda: list(adapter.read_all()), lambda: adapter.read(min(adapter.folder.shapes))):
        with pytest.raises(InputError, match="adapter mlp "):
            read()


def test_a_hub_adapter_has_its_name_and_commit(monkeypatch, tmp_path):
    asked = []

    def download(name, revision=None, **how):
        asked.append((name, revision, how["local_files_only"], how["allow_patterns"]))
        return str(write_tiny_adapter(tmp_path / "snapshots" / "0123abc", 1))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (adapter,) = load_library(["some/adapter@v2"])
    assert (adapter.name, adapter.revision) == ("adapter", "0123abc")
    assert is_here("some/adapter@v2")
    assert [of[:3] for of in asked] == [("some/adapter", "v2", here) for here in (False, True)]
    assert not any(fnmatch(name, of) for name in ("theirs.py", "adapter_model.bin") for of in asked[0][3])


def test_base_of(tiny_library, tmp_path, caplog):
    adapters = load_library([str(tiny_library)])
    assert base_of(adapters) == "tiny"
    mute, foreign = (
        load_library([str(write_tiny_adapter(tmp_path / f"{name}", 4, base_model_name_or_path=name))])
        for name in (None, "huge")
    )
    whole, copy, one, other = (
        load_library([str(write_tiny_adapter(tmp_path / f"of {n}", 4, base_model_name_or_path=base))])
        for n, base in enumerate(("org/Tiny", "unsloth/tiny-bnb-4bit", "/one/merged", "/other/merged"))
    )
    assert base_of([*copy, *mute, *whole]) == "org/Tiny"
    with pytest.raises(InputError, match="--base_model"):
        base_of([*one, *other])
    for unclear in (mute, [*adapters, *foreign]):
        with pytest.raises(InputError, match="--base_model"):
            base_of(unclear)
    check_against_base(adapters, "Tiny", False, SHAPES)  # the hub's names are the same in any case
    check_against_base([*adapters, *mute], "/models/anything", True, SHAPES)
    assert not caplog.text
    check_against_base([*adapters, *foreign], "/models/anything", True, SHAPES)
    assert "huge, tiny" in caplog.text
    module = "model.layers.1.mlp.down_proj"
    for of, shapes, cause in (
        (foreign, SHAPES, "adapter huge .*tiny"),
        (adapters, SHAPES | {module: (32, 64)}, rf"everything .*{module} .*\(32, 48\).*\(32, 64\)"),
    ):
        with pytest.raises(InputError, match=cause):
            check_against_base(of, "tiny", False, shapes)


def test_adapters_inside_an_adapter_are_named(tmp_path, caplog):
    """As PEFT saves a model with several adapters, and the Trainer one after some steps."""
    for name in (".", "french", "checkpoint-10"):
        write_tiny_adapter(tmp_path / "all" / name, seed=1)
    assert [adapter.name for adapter in load_library([str(tmp_path / "all")])] == ["all"]
    assert "left out: french" in caplog.text and "checkpoint" not in caplog.text


def test_the_last_block_is_one_that_reads_text():
    """Of a model that sees pictures, too, with more blocks for them."""
    text, eyes = "model.language_model.layers.1.self_attn.q_proj", "model.vision_tower.layers.7.q_proj"
    both, seeing = (
        SimpleNamespace(name=str(len(m)), folder=SimpleNamespace(shapes=m)) for m in ((text, eyes), (eyes,))
    )
    assert last_block([both]) == [eyes] and last_block([both], "model.language_model.") == [text]
    assert last_block([seeing], "model.language_model.") == [eyes]
