"""Calibration is measured once for each base model and adapter, and is what a fresh measurement is."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import ROOT, edit_json, read_table
from router.model.answer import encode
from router.model.base import linear_shapes, load_base
from router.model.frames import Frame
from router.model.hooks import reading_inputs
from router.pipeline.calibration import Calibration
from router.routing.calibration import generic_prompts
from router.routing.probe import END, input_means, probe
from router.routing.prototypes import prototypes
from router.system.errors import InputError

TEXTS = [f"{'word ' * n}{n}: is it so?" for n in range(1, 13)]
SHIPPED = generic_prompts()


@pytest.fixture(autouse=True)
def few_texts(cache, monkeypatch):
    monkeypatch.setattr("router.pipeline.calibration.generic_prompts", lambda frame: TEXTS)


def measured(base, adapters, limit=None):
    """All that a calibration gives, as arrays by name."""
    calibration, protos = Calibration(base, limit), prototypes(adapters)
    means = calibration.means(list(protos))
    responses = calibration.responses(adapters, protos, means)
    return {module: mean.numpy() for module, mean in means.items()} | {"responses": responses}


def fresh(base, adapters, limit=None):
    """The same without a calibration."""
    rows = encode(base.tokenizer, TEXTS, limit)
    modules = sorted({module for adapter in adapters for module in adapter.folder.shapes})
    (means, _), protos = input_means(base.model, rows, 0, modules), prototypes(adapters)
    responses = probe(base.model, rows, 0, {m: protos[m] for m in modules}, means, len(adapters)).responses
    return {module: mean.numpy() for module, mean in means.items()} | {"responses": responses}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-6, err_msg=name)


def bytes_of(found):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in found.items()}


@pytest.mark.parametrize("limit", [None, 9])
def test_it_is_what_a_fresh_measurement_is_cold_or_warm(base, adapters, limit):
    expected = fresh(base, adapters, limit)
    assert_close(measured(base, adapters, limit), expected)
    assert expected["responses"].shape == (len(TEXTS), len(adapters), 14, 2)
    warm = measured(base, adapters[::-1], limit)  # each adapter's own, wherever it stands
    np.testing.assert_allclose(warm["responses"][:, ::-1], expected["responses"], rtol=1e-4, atol=1e-6)


def test_the_second_use_asks_nothing_and_gives_the_same_bytes(base, adapters, monkeypatch):
    attention, everything, _ = adapters
    measured(base, [attention])  # modules that it does not change are measured when they are asked for
    assert_close(measured(base, [attention, everything]), fresh(base, [attention, everything]))
    first = measured(base, adapters)
    monkeypatch.setattr(base.model, "forward", lambda *_, **__: pytest.fail("a forward pass"))
    assert bytes_of(measured(base, adapters)) == bytes_of(first)


@pytest.mark.parametrize("keep", [0, 7, 0.5])
def test_a_broken_file_is_measured_again(base, adapters, cache, keep):
    first = measured(base, adapters)
    whole = {file: file.read_bytes() for file in cache.rglob("*.safetensors")}
    assert len(whole) == 7  # means, and each adapter's responses and prototypes
    for file, data in whole.items():
        file.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
    assert_close(measured(base, adapters), first)
    again = {file: len(file.read_bytes()) for file in cache.rglob("*") if file.is_file()}
    assert again == {file: len(data) for file, data in whole.items()}  # and kept again


def spoilt(base, name, **fields):
    """The base model, read of another folder in which a file has other fields."""
    folder = Path(base.name).parent / "spoilt"
    shutil.copytree(base.name, folder, dirs_exist_ok=True)
    edit_json(folder / name, **fields)
    return load_base(str(folder), "cpu", "float32")


PREFIXED = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
OTHER = {
    "limit": lambda base, patch: Calibration(base, 9),
    "texts": lambda base, patch: patch.setattr(
        "router.pipeline.calibration.generic_prompts", lambda frame: TEXTS[:-1]
    ),
    "config": lambda base, patch: spoilt(base, "config.json", rms_norm_eps=0.1),
    "tokenizer": lambda base, patch: spoilt(base, "tokenizer.json", pre_tokenizer=PREFIXED),
    "weights": lambda base, patch: replace(base, sha256="0" * 64),
    "dtype": lambda base, patch: replace(base, model=copy.deepcopy(base.model).bfloat16()),
    "device": lambda base, patch: replace(base, model=copy.deepcopy(base.model).to("meta")),
    "torch": lambda base, patch: patch.setattr("torch.__version__", "2.0.0"),
    "threads": lambda base, patch: patch.setattr("torch.get_num_threads", lambda: 99),
    "format": lambda base, patch: patch.setattr("router.pipeline.calibration.FORMAT", 0),
    "prototypes": lambda base, patch: patch.setattr("router.pipeline.calibration.PROTOTYPES", 0),
}


@pytest.mark.parametrize("what", OTHER)
def test_what_would_be_measured_differently_has_another_folder(base, monkeypatch, what):
    before = Calibration(base).folder
    other = OTHER[what](base, monkeypatch) or base
    assert (other if isinstance(other, Calibration) else Calibration(other)).folder != before


def test_the_shipped_texts_are_no_query_of_ours():
    assert len(SHIPPED) == len(set(SHIPPED)) == 160
    assert all(text.strip() for text in SHIPPED)
    folders = (ROOT / "data" / name for name in ("eval", "eval_unseen", "eval_foreign"))
    files = [ROOT / "data" / "test.csv", *(path for folder in folders for path in folder.glob("*.csv"))]
    known = {row["input"] for path in files for row in read_table(path)}
    assert known and not known & set(SHIPPED)
    frame = Frame("user: ", "\nassistant: ")  # in which messages come to them
    framed = generic_prompts(frame)
    assert framed[: len(SHIPPED)] == [frame.around(text) for text in SHIPPED]
    talk = framed[len(SHIPPED) :]
    assert len(set(talk)) == len(talk) == 70 and all(text.startswith("user: ") for text in talk)


def test_what_all_prompts_of_a_frame_begin_with_is_not_counted(base, monkeypatch):
    frame = Frame("system: be kind\nuser: ", "\nassistant: ")
    few = "router.pipeline.calibration.generic_prompts"
    monkeypatch.setattr(few, lambda of: [of.around(text) for text in "xyz"])
    calibration = Calibration(base, None, frame)
    ids = encode(base.tokenizer, [frame.before])[0]
    assert calibration.framing.prefix == ids and Calibration(base).framing.prefix == []
    modules = linear_shapes(base.model)
    means, _ = input_means(base.model, calibration.rows[:3], 0, list(modules), calibration.framing.prefix)
    seen = {name: [] for name in modules}
    for row in calibration.rows[:3]:
        with reading_inputs(
            base.model, list(modules), lambda name, x: seen[name].append(x[0, len(ids) :].detach())
        ):
            base.model(input_ids=torch.tensor([row]))
    for name, mean in means.items():
        np.testing.assert_allclose(mean, torch.cat(seen[name]).double().mean(0), rtol=1e-4, atol=1e-5)
    marks = "<eos>\nassistant: "  # are part of a prompt's end
    chat, plain = (Calibration(base, None, Frame("user: ", after)) for after in (marks, marks[5:]))
    assert (chat.framing.end, plain.framing.end) == (END + len(encode(base.tokenizer, [marks])[0]), END)
    assert Calibration(base).framing.end == END


def test_generic_text_that_overflows_is_refused_with_what_helps(base, adapters, monkeypatch):
    def overflows(*how):
        means, confidence = input_means(*how)
        return means, confidence.where(torch.arange(len(confidence)) > 0, torch.inf)

    monkeypatch.setattr("router.pipeline.calibration.input_means", overflows)
    with pytest.raises(InputError, match="--dtype"):
        measured(base, adapters)
