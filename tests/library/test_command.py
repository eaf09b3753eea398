"""The library's command: what it says of sound and broken adapters."""

import hashlib
import json
import re
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

from helpers import WIDTHS, edit_json, edit_weights, write_tiny_adapter
from merge.folders import CONFIG_FILE, WEIGHTS_FILE
from router.library.adapters import load_library
from router.library.command import main
from router.system.errors import InputError

SCALES = {"attention": 8 / 4, "everything": 2 / 2, "mlp": 9 / 6**0.5}


def vector(folder, scale):
    """All modules of the dense update in float64, side by side, zero where there is none."""
    tensors, parts = load_file(folder / "adapter_model.safetensors"), []
    for layer in range(2):
        for kind, (d_out, d_in) in WIDTHS.items():
            key = f"base_model.model.model.layers.{layer}.{kind}.lora_"
            a = tensors.get(f"{key}A.weight", torch.zeros(1, d_in)).double()
            b = tensors.get(f"{key}B.weight", torch.zeros(d_out, 1)).double()
            parts.append((scale * b @ a).flatten())
    return torch.cat(parts).numpy()


def run(capsys, *words):
    code = main([str(word) for word in words])
    return code, *capsys.readouterr()


def checked(capsys, *words):
    code, out, _ = run(capsys, "check", "--json", *words)
    return code, json.loads(out)


@pytest.fixture()
def duplicated(tiny_library):
    """Beside the three: one of them in double size, and one of them slightly changed."""
    shutil.copytree(tiny_library / "attention", tiny_library / "larger")
    edit_json(tiny_library / "larger" / CONFIG_FILE, lora_alpha=16)
    shutil.copytree(tiny_library / "mlp", tiny_library / "nearly")
    generator = torch.Generator().manual_seed(0)
    edit_weights(
        tiny_library / "nearly" / WEIGHTS_FILE,
        lambda _, value: value + 0.01 * torch.randn(value.shape, generator=generator),
    )
    return tiny_library


def test_cosines_are_those_of_the_dense_updates(capsys, duplicated):
    names = ["attention", "everything", "larger", "mlp", "nearly"]
    scales = SCALES | {"larger": 16 / 4, "nearly": SCALES["mlp"]}
    dense = np.stack([vector(duplicated / name, scales[name]) for name in names])
    _, found = checked(capsys, duplicated)
    assert found["compared"] == names
    np.testing.assert_allclose(found["norms"], np.linalg.norm(dense, axis=1), rtol=1e-6)
    unit = dense / np.linalg.norm(dense, axis=1, keepdims=True)
    np.testing.assert_allclose(found["cosines"], unit @ unit.T, atol=1e-6)
    pairs = [["attention", "larger"], ["mlp", "nearly"]]
    assert [pair for *pair, _ in found["near_duplicates"]] == pairs
    assert found["near_duplicates"][0][2] == pytest.approx(1, abs=1e-9)


def test_a_sound_library(capsys, tiny_library):
    code, out, error = run(capsys, "check", tiny_library)
    assert code == 0 and error == ""
    table, _, rest = out.partition("\n\n")
    rows = [re.split(r" {2,}", line) for line in table.splitlines()[1:]]
    assert [row[:6] for row in rows] == [
        ["attention", "yes", "tiny", "4", "2", "k_proj o_proj q_proj v_proj"],
        ["everything", "yes", "tiny", "2", "1", "down_proj gate_proj up_proj k_proj o_proj q_proj v_proj"],
        ["mlp", "yes", "tiny", "6", "3.674", "down_proj gate_proj up_proj"],
    ]
    assert [row[6] for row in rows] == ["LoRA", "LoRA", "rsLoRA"]
    assert rest == "3 adapters, 0 of them broken\n"


def test_the_facts_are_those_of_the_files(capsys, tiny_library):
    _, found = checked(capsys, tiny_library)
    for facts in found["adapters"]:
        folder = tiny_library / facts["name"]
        weights = folder / "adapter_model.safetensors"
        assert facts["path"] == str(folder) and facts["revision"] is None
        assert facts["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert facts["parameters"] == sum(value.numel() for value in load_file(weights).values())
        assert facts["bytes"] == len(weights.read_bytes())
        assert facts["scales"] == pytest.approx([SCALES[facts["name"]]])
        assert facts["sound"] and facts["reason"] is None and facts["base_model"] == "tiny"
    assert [facts["ranks"] for facts in found["adapters"]] == [[4], [2], [6]]
    assert [facts["rslora"] for facts in found["adapters"]] == [False, False, True]
    assert found["adapters"][0]["modules"] == dict.fromkeys(["k_proj", "o_proj", "q_proj", "v_proj"], 2)


def test_duplicates_and_giants_are_said_plainly(capsys, duplicated):
    write_tiny_adapter(duplicated / "giant", 8, size=3.0)
    write_tiny_adapter(duplicated / "dwarf", 9, size=0.03)
    _, out, _ = run(capsys, "check", duplicated)
    code, found = checked(capsys, duplicated)
    assert code == 0
    norms = dict(zip(found["compared"], found["norms"], strict=True))
    sizes = {name: norms[name] / np.median(list(norms.values())) for name in ("dwarf", "giant")}
    assert found["outliers"] == pytest.approx(sizes)
    assert re.findall(r"^(?:duplicates|outlier).*$", out, re.MULTILINE) == [
        "duplicates: attention and larger: cosine 1.0000",
        f"duplicates: mlp and nearly: cosine {found['near_duplicates'][1][2]:.4f}",
        f"outlier: dwarf: its update has {sizes['dwarf']:.3g} times the median norm",
        f"outlier: giant: its update has {sizes['giant']:.3g} times the median norm",
    ]


def turned(key, tensor):
    """It writes something else, and reads just the same, just as strongly."""
    return tensor.flip(0) if "lora_B" in key else tensor


def test_a_copy_that_writes_something_else_is_said_plainly(capsys, tiny_library):
    shutil.copytree(tiny_library / "mlp", tiny_library / "turned")
    edit_weights(tiny_library / "turned" / WEIGHTS_FILE, turned)
    _, out, _ = run(capsys, "check", tiny_library)
    code, found = checked(capsys, tiny_library)
    [(one, other, overlap, cosine)] = found["look_alikes"]
    assert code == 0 and (one, other) == ("mlp", "turned")
    assert overlap == pytest.approx(1, abs=1e-5) and abs(cosine) < 0.5
    assert "look-alikes: mlp and turned: they read the same (overlap 1.00)" in out


def narrow(folder):
    edit_weights(folder / WEIGHTS_FILE, lambda key, value: value[:, :16] if "lora_A" in key else value)


def scaled(by):
    return lambda folder: edit_weights(folder / WEIGHTS_FILE, lambda _, value: value * by)


def changed(**config):
    return lambda folder: edit_json(folder / CONFIG_FILE, **config)


BROKEN = {
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), "expected a PEFT folder"),
    "huge alpha": (changed(lora_alpha=10**400), "lora_alpha to be a positive number"),
    "NaN": (scaled(torch.nan), "not finite"),
    "zero": (scaled(0), "got zero at every module"),
    "other base": (changed(base_model_name_or_path="Huge"), "expected an adapter of tiny, got one of Huge"),
    "other shape": (narrow, "down_proj has shape (32, 16), but tiny has (32, 48)"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_adapter_is_named_and_the_others_are_checked(capsys, tiny_library, kind):
    breaking, reason = BROKEN[kind]
    breaking(write_tiny_adapter(tiny_library / "half", 5))
    code, out, _ = run(capsys, "check", tiny_library)
    assert code == 2 and "4 adapters, 1 of them broken" in out and re.search(r"^half +NO", out, re.M)
    (line,) = re.findall(r"^broken: (.*)$", out, re.MULTILINE)
    assert line.startswith("half: ") and str(tiny_library / "half") in line and reason in line
    code, found = checked(capsys, tiny_library)
    assert code == 2 and reason in found["adapters"][2]["reason"]
    assert [facts["sound"] for facts in found["adapters"]] == [True, True, False, True]
    assert found["compared"] == ["attention", "everything", "mlp"]


def test_all_broken_ones_are_named(capsys, tiny_library):
    for name in ("attention", "everything", "mlp"):
        edit_json(tiny_library / name / CONFIG_FILE, use_dora=True)
    code, out, _ = run(capsys, "check", tiny_library)
    assert code == 2
    assert re.findall(r"^broken: (\S+): ", out, re.MULTILINE) == ["attention", "everything", "mlp"]
    assert checked(capsys, tiny_library)[1]["cosines"] == []


def test_names_that_a_run_refuses(capsys, tiny_library, tmp_path):
    odd = [write_tiny_adapter(tmp_path / name, 4) for name in ("base", "id", "variant", "a\x1b[2Jb")]
    shutil.copytree(tiny_library / "mlp", tmp_path / "other" / "mlp")
    odd.append(tmp_path / "other" / "mlp")
    code, found = checked(capsys, tiny_library, *odd)
    reasons = [facts["reason"] for facts in found["adapters"]]
    assert code == 2 and reasons[:3] == [None] * 3
    for folder, reason in zip(odd, reasons[3:], strict=True):
        with pytest.raises(InputError) as told:
            load_library([str(tiny_library), str(folder)])
        assert reason == str(told.value) and "rename the folder" in reason


def test_an_unreachable_hub(capsys, monkeypatch, tiny_library):
    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    code, found = checked(capsys, tiny_library, "some/knitter@v1")
    assert code == 2 and found["adapters"][3]["name"] == "knitter"
    assert "the hub could not give it" in found["adapters"][3]["reason"]
