"""The library's command: what it says of sound and broken adapters."""

import hashlib
import json
import re
import shutil
from unittest.mock import Mock

import huggingface_hub
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from helpers import WIDTHS, dense_updates, edit_json, edit_weights, write_tiny_adapter
from merge.folders import CONFIG_FILE, WEIGHTS_FILE
from router.cli import main as cli
from router.library.adapters import load_library
from router.system.errors import InputError


def main(words):
    return cli(["library", *words])


SCALES = {"attention": 8 / 4, "everything": 2 / 2, "mlp": 9 / 6**0.5}


def vector(folder):
    """All modules of the dense update in float64, side by side, zero where there is none."""
    updates = dense_updates(folder)
    zeros = {f"model.layers.{n}.{kind}": np.zeros(shape) for n in range(2) for kind, shape in WIDTHS.items()}
    return np.concatenate([updates.get(module, zero).ravel() for module, zero in zeros.items()])


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
    dense = np.stack([vector(duplicated / name) for name in names])
    _, found = checked(capsys, duplicated)
    assert found["compared"] == names
    np.testing.assert_allclose(found["norms"], np.linalg.norm(dense, axis=1), rtol=1e-6)
    unit = dense / np.linalg.norm(dense, axis=1, keepdims=True)
    np.testing.assert_allclose(found["cosines"], unit @ unit.T, atol=1e-6)
    pairs = [["attention", "larger"], ["mlp", "nearly"]]
    assert [pair for *pair, _ in found["near_duplicates"]] == pairs
    assert found["near_duplicates"][0][2] == pytest.approx(1, abs=1e-9)


def test_the_facts_are_those_of_the_files(capsys, tiny_library):
    code, out, error = run(capsys, "check", tiny_library)
    assert code == 0 and error == ""
    rows = [re.split(r" {2,}", line) for line in out.partition("\n\n")[0].splitlines()[1:]]
    _, found = checked(capsys, tiny_library)
    kinds = {"attention": "LoRA", "everything": "LoRA", "mlp": "rsLoRA"}
    for row, facts in zip(rows, found["adapters"], strict=True):
        folder = tiny_library / facts["name"]
        weights = folder / "adapter_model.safetensors"
        assert row[:5] == [facts["name"], "yes", "tiny", str(facts["ranks"][0]), f"{facts['scales'][0]:.4g}"]
        assert row[6] == kinds[facts["name"]] and facts["rslora"] == (row[6] == "rsLoRA")
        assert facts["path"] == str(folder) and facts["revision"] is None
        assert facts["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
        assert facts["parameters"] == sum(value.numel() for value in load_file(weights).values())
        assert facts["bytes"] == len(weights.read_bytes())
        assert facts["scales"] == pytest.approx([SCALES[facts["name"]]])
        assert facts["sound"] and facts["reason"] is None and facts["base_model"] == "tiny"
    assert [facts["ranks"] for facts in found["adapters"]] == [[4], [2], [6]]
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
    assert re.findall(r"^(?:duplicates|outlier): (\w+(?: and \w+)?)", out, re.MULTILINE) == [
        "attention and larger", "mlp and nearly", "dwarf", "giant",
    ]  # fmt: skip


def test_a_copy_that_writes_something_else_is_said_plainly(capsys, tiny_library):
    shutil.copytree(tiny_library / "mlp", tiny_library / "turned")
    turned = tiny_library / "turned" / WEIGHTS_FILE  # it reads just the same, just as strongly
    edit_weights(turned, lambda key, of: of.flip(0) if "lora_B" in key else of)
    _, out, _ = run(capsys, "check", tiny_library)
    code, found = checked(capsys, tiny_library)
    [(one, other, overlap, cosine)] = found["look_alikes"]
    assert code == 0 and (one, other) == ("mlp", "turned")
    assert overlap == pytest.approx(1, abs=1e-5) and abs(cosine) < 0.5
    assert "mlp and turned" in out


def changed(**config):
    return lambda folder: edit_json(folder / CONFIG_FILE, **config)


def weights(change):
    return lambda folder: edit_weights(folder / WEIGHTS_FILE, change)


BROKEN = {
    "no config": (lambda folder: (folder / CONFIG_FILE).unlink(), CONFIG_FILE),
    "huge alpha": (changed(lora_alpha=10**400), "lora_alpha"),
    "NaN": (weights(lambda key, of: of * torch.nan), "not finite"),
    "zero": (weights(lambda key, of: of * 0), "zero"),
    "other base": (changed(base_model_name_or_path="Huge"), "Huge"),
    "other shape": (weights(lambda key, of: of[:, :16] if "lora_A" in key else of), "(32, 16)"),
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


def test_the_most_usual_base_model_has_any_of_its_names(capsys, tmp_path):
    names = "x/other", "x/other", "org/Model-A", "unsloth/model-a-bnb-4bit", "me/Model-A"
    for n, name in enumerate(names):
        write_tiny_adapter(tmp_path / f"adapter{n}", n, base_model_name_or_path=name)
    code, found = checked(capsys, tmp_path)
    assert code == 2 and [facts["sound"] for facts in found["adapters"]] == [False] * 2 + [True] * 3
    assert "org/Model-A" in found["adapters"][0]["reason"]


def test_names_that_a_run_refuses(capsys, tiny_library, tmp_path, monkeypatch):
    odd = [write_tiny_adapter(tmp_path / name, 4) for name in ("base", "id", "variant", "a\x1b[2Jb")]
    odd.append(shutil.copytree(tiny_library / "mlp", tmp_path / "other" / "mlp"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Mock(side_effect=ConnectionError()))
    code, found = checked(capsys, tiny_library, *odd, "some/knitter@v1")
    reasons = [facts["reason"] for facts in found["adapters"]]
    assert code == 2 and reasons[:3] == [None] * 3
    for spec, reason in zip([*odd, "some/knitter@v1"], reasons[3:], strict=True):
        with pytest.raises(InputError) as told:
            load_library([str(tiny_library), str(spec)])
        assert reason == str(told.value) and "\x1b" not in reason
