"""The library: found where it is said to be, sound, of one base model."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file

from helpers import WIDTHS, write_tiny_adapter
from router.library.adapters import base_of, check_against_base, load_library
from router.library.sources import find, is_here
from router.routing.prototypes import prototypes
from router.system.errors import InputError

SHAPES = {f"model.layers.{layer}.{kind}": shape for layer in range(2) for kind, shape in WIDTHS.items()}


def names(specs):
    return [adapter.name for adapter in load_library([str(spec) for spec in specs])]


def test_folders_of_folders_come_in_order_of_name(tiny_library):
    (tiny_library / ".cache").mkdir()
    (tiny_library / "README.md").write_text("not an adapter")
    assert names([tiny_library]) == ["attention", "everything", "mlp"]


def test_single_folders_come_in_the_order_given(tiny_library, monkeypatch):
    assert names([tiny_library / "mlp", f"{tiny_library}/attention/"]) == ["mlp", "attention"]
    (tiny_library / "everything" / "inside").mkdir()
    monkeypatch.chdir(tiny_library / "everything")
    assert names(["."]) == names(["inside/.."]) == ["everything"]
    monkeypatch.chdir("inside")
    assert names([".."]) == ["everything"]


def test_names_are_looked_up_in_the_library(tiny_library, monkeypatch):
    monkeypatch.setattr("router.library.sources.LIBRARY", tiny_library)
    assert names(["mlp", "everything"]) == ["mlp", "everything"]


def test_the_record_of_an_adapter_is_the_sha256_of_its_weights(tiny_library):
    (adapter,) = load_library([str(tiny_library / "mlp")])
    data = (tiny_library / "mlp" / "adapter_model.safetensors").read_bytes()
    assert adapter.sha256 == hashlib.sha256(data).hexdigest()
    assert adapter.revision is None


def test_adapters_of_one_name_are_refused(tiny_library, tmp_path):
    shutil.copytree(tiny_library / "mlp", tmp_path / "other" / "mlp")
    with pytest.raises(InputError, match="adapter 'mlp'"):
        load_library([str(tiny_library), str(tmp_path / "other" / "mlp")])


@pytest.mark.parametrize("name", ["base", "id", "variant", "evil\x1b[2J"])
def test_a_name_that_is_no_column_is_refused_and_not_printed(tmp_path, name):
    (tmp_path / name).mkdir()  # broken, too
    with pytest.raises(InputError, match="rename the folder") as told:
        load_library([str(tmp_path)])
    assert "\x1b" not in str(told.value)


BAD = {
    "broken": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"no"),
        "a complete safetensors",
    ),
    "dora": (lambda folder: write_tiny_adapter(folder, 4, use_dora=True), "use_dora = True"),
    "id": (lambda folder: None, "rename the folder"),
    "infinite": (lambda folder: write_tiny_adapter(folder, 4, size=1e30), "not finite, or too large"),
    "zero": (lambda folder: write_tiny_adapter(folder, 4, size=0.0), "got zero at every module"),
    "pissa": (lambda folder: write_tiny_adapter(folder, 4, init_lora_weights="pissa"), "base's weights"),
}


def test_bad_adapters_are_left_out_and_listed_if_that_is_asked_for(tiny_library):
    for name, (spoil, _) in BAD.items():
        spoil(write_tiny_adapter(tiny_library / name, 4))
    bad = []
    specs = [str(tiny_library), str(tiny_library / "mlp"), "no/such/adapter"]
    found = load_library(specs, local_only=True, bad=bad)
    assert [adapter.name for adapter in found] == ["attention", "everything", "mlp"]
    causes = [*(cause for _, (_, cause) in sorted(BAD.items())), "rename the folder", "no such folder"]
    assert len(bad) == len(causes) and all(cause in line for cause, line in zip(causes, bad, strict=True))
    assert all(str(tiny_library / name) in line for name, line in zip(sorted(BAD), bad, strict=False))
    other = {module: shape for module, shape in SHAPES.items() if "mlp" not in module}
    (attention,) = check_against_base(found, "tiny", True, other, bad := [])
    assert attention.name == "attention" and len(bad) == 2
    with pytest.raises(InputError, match=r"--skip_bad: .*zero"):
        load_library([str(tiny_library / "zero")], bad=[])


def test_values_that_float32_cannot_multiply_are_refused(tmp_path):
    (adapter,) = load_library([str(write_tiny_adapter(tmp_path / "huge", 1, size=1e25))])
    with pytest.raises(InputError, match=r"huge .*float32"):
        prototypes([adapter])


def test_links_are_named_as_they_are_called(tmp_path):
    write_tiny_adapter(tmp_path / "store" / "weights", 1)
    for name in ("one", "two"):
        (tmp_path / "library" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "library" / name).symlink_to(tmp_path / "store" / "weights")
    assert names([tmp_path / "library"]) == ["one", "two"] and names([tmp_path / "library" / "two"]) == [
        "two"
    ]


def test_a_thousand_adapters_are_opened_in_order(tmp_path):
    one = write_tiny_adapter(tmp_path / "store", 1, kinds=("self_attn.q_proj",))
    (tmp_path / "library").mkdir()
    expected = [f"adapter-{n:04}" for n in range(1000)]
    for name in reversed(expected):
        (tmp_path / "library" / name).symlink_to(one)
    assert names([tmp_path / "library"]) == expected


@pytest.mark.parametrize("call", ["exists", "iterdir", "is_dir"])
def test_a_folder_that_cannot_be_read_is_refused_in_a_sentence(tiny_library, monkeypatch, call):
    usual = getattr(Path, call)
    denied = {
        "exists": tiny_library / "adapter_config.json", "iterdir": tiny_library,
        "is_dir": tiny_library / "mlp",
    }  # fmt: skip

    def called(path):
        if path == denied[call]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path)

    monkeypatch.setattr(Path, call, called)
    with pytest.raises(InputError, match=f"--adapters {tiny_library}: .*Permission denied"):
        load_library([str(tiny_library)])
    bad = []  # with --skip_bad it is left out
    (one,) = load_library([str(tiny_library / "attention"), str(tiny_library)], bad=bad)
    assert one.name == "attention" and len(bad) == 1


def test_what_was_fetched_is_all_that_is_looked_for_in_the_cache(monkeypatch, tmp_path):
    asked = []

    def download(name, **how):
        asked.append((how["local_files_only"], how["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find("some/adapter")
    assert is_here("some/adapter")
    files = ["adapter_config.json", "adapter_model.safetensors", "README.md", "chat_template.jinja"]
    assert asked == [(False, files), (True, files)]


def test_the_default_library_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("router.library.sources.fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="--adapters data/library"):
        load_library(["data/library"])


def test_weights_that_are_replaced_after_they_were_opened_do_not_reach_the_cache(tmp_path, monkeypatch):
    # An empty cache: another test may have kept the prototypes of the same adapter, which are not read then.
    monkeypatch.setattr("router.library.store.cache_folder", lambda: tmp_path / "cache")
    folder = write_tiny_adapter(tmp_path / "one", 1)
    (adapter,) = load_library([str(folder)])
    write_tiny_adapter(folder, 2)
    with pytest.raises(InputError, match="adapter one "):
        prototypes([adapter])
    (again,) = load_library([str(folder)])
    assert not torch.equal(
        prototypes([again])["model.layers.0.mlp.up_proj"].directions,
        _prototype_of(tmp_path / "other", 1),
    )


def _prototype_of(folder, seed):
    (adapter,) = load_library([str(write_tiny_adapter(folder, seed))])
    return prototypes([adapter])["model.layers.0.mlp.up_proj"].directions


def test_a_folder_without_adapters_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}: "):
        load_library([str(tmp_path)])


def test_a_broken_adapter_among_sound_ones_is_named(tiny_library):
    (tiny_library / "half").mkdir()
    with pytest.raises(InputError, match=f"{tiny_library / 'half'}: .*adapter_config.json"):
        load_library([str(tiny_library)])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_found_on_reading(tiny_library, value):
    file = tiny_library / "mlp" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[key][3, 2] = value
    save_file(tensors, file)
    (adapter,) = load_library([str(tiny_library / "mlp")])
    with pytest.raises(InputError, match=r"adapter mlp .*layers\.1\.mlp\.up_proj"):
        list(adapter.read_all())


@pytest.mark.parametrize(
    "spoilt", [Path.unlink, lambda file: os.truncate(file, 3000), lambda file: save_file({}, file)],
    ids=["gone", "truncated", "others"],
)  # fmt: skip
@pytest.mark.parametrize(
    "read", [lambda of: list(of.read_all()), lambda of: of.read(min(of.folder.shapes))], ids=["all", "one"]
)  # fmt: skip
def test_weights_that_vanish_after_the_check_are_named(tiny_library, spoilt, read):
    (adapter,) = load_library([str(tiny_library / "mlp")])
    spoilt(tiny_library / "mlp" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter mlp .*cannot be read"):
        read(adapter)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network"), ConnectionError()])
def test_an_unreachable_hub_points_at_local_folders(monkeypatch, error):
    def unreachable(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match="--adapters some/adapter@v2: "):
        load_library(["some/adapter@v2"])


def test_a_hub_adapter_has_its_name_and_commit(monkeypatch, tmp_path):
    asked = []

    def download(name, revision=None, **_):
        asked.append((name, revision))
        return str(write_tiny_adapter(tmp_path / "snapshots" / "0123abc", 1))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (adapter,) = load_library(["some/adapter@v2"])
    assert asked == [("some/adapter", "v2")]
    assert (adapter.name, adapter.revision) == ("adapter", "0123abc")


def test_base_of(tiny_library, tmp_path):
    adapters = load_library([str(tiny_library)])
    assert base_of(adapters) == "tiny"
    write_tiny_adapter(tmp_path / "mute", 4, base_model_name_or_path=None)
    mute = load_library([str(tmp_path / "mute")])
    assert base_of([*adapters, *mute]) == "tiny"
    with pytest.raises(InputError, match="--base_model"):
        base_of(mute)
    write_tiny_adapter(tmp_path / "foreign", 5, base_model_name_or_path="huge")
    with pytest.raises(InputError, match=r"tiny.*huge.*--base_model"):
        base_of([*adapters, *load_library([str(tmp_path / "foreign")])])


def test_adapters_that_fit_pass(tiny_library):
    adapters = load_library([str(tiny_library)])
    check_against_base(adapters, "Tiny", False, SHAPES)  # the hub's names are the same in any case
    check_against_base(adapters, "/models/anything", True, SHAPES)


def test_an_adapter_of_another_base_is_refused(tiny_library):
    file = tiny_library / "mlp" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "huge"}))
    with pytest.raises(InputError, match=r"adapter mlp .*tiny.*huge"):
        check_against_base(load_library([str(tiny_library)]), "tiny", False, SHAPES)


@pytest.mark.parametrize("is_folder", [True, False])
def test_an_adapter_of_another_shape_is_refused(tiny_library, is_folder):
    module = "model.layers.1.mlp.down_proj"
    with pytest.raises(InputError, match=rf"everything .*{module} .*\(32, 48\).*\(32, 64\)"):
        check_against_base(load_library([str(tiny_library)]), "tiny", is_folder, SHAPES | {module: (32, 64)})


def test_an_adapter_of_a_missing_layer_is_refused(tiny_library):
    shapes = {module: shape for module, shape in SHAPES.items() if "layers.1" not in module}
    with pytest.raises(InputError, match=r"adapter attention .*layers\.1\."):
        check_against_base(load_library([str(tiny_library)]), "tiny", True, shapes)
