"""Calibration is measured once for each base model and adapter, and is what a fresh measurement is."""

import json
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from helpers import write_tiny_adapter
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import load_base
from router.routing.calibration import EVERY, Calibration
from router.routing.probe import input_means, last_of, probe
from router.routing.prototypes import prototypes
from router.routing.trial import trial

TEXTS = [f"{'word ' * n}{n}: is it so?" for n in range(1, 13)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and few texts."""
    monkeypatch.setattr("router.routing.store.cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr("router.routing.calibration.generic_prompts", lambda: TEXTS)
    return tmp_path / "cache"


def measured(base, adapters, limit=None):
    """All that a calibration gives, as arrays by name."""
    calibration = Calibration(base, limit)
    protos = prototypes(adapters)
    means = calibration.means(list(protos))
    responses = calibration.responses(adapters, protos, means)
    trials = calibration.trials(adapters, np.ones((1, len(adapters)), dtype=bool))
    means = {module: mean.numpy() for module, mean in means.items()}
    return means | {"responses": responses} | trials._asdict()


def fresh(base, adapters, limit=None):
    """The same without a calibration."""
    rows = encode(base.tokenizer, TEXTS, limit)
    modules = sorted({module for adapter in adapters for module in adapter.folder.shapes})
    means, protos = input_means(base.model, rows, 0, modules), prototypes(adapters)
    responses = probe(base.model, rows, 0, {m: protos[m] for m in modules}, means, len(adapters)).responses
    last = last_of(base.model, rows[::EVERY], 0)
    trials = trial(base, adapters, rows[::EVERY], last, np.ones((len(rows[::EVERY]), len(adapters)), bool))
    means = {module: mean.numpy() for module, mean in means.items()}
    return means | {"responses": responses} | trials._asdict()


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
    warm = measured(base, adapters[::-1], limit)
    for name in ("responses", "effect", "confidence"):  # each adapter's own, wherever it stands
        np.testing.assert_allclose(warm[name][:, ::-1], expected[name], rtol=1e-4, atol=1e-6)


def test_the_second_use_asks_the_model_nothing_and_gives_the_same_bytes(base, adapters, monkeypatch):
    first = measured(base, adapters)

    def refuse(*args, **kwargs):
        raise AssertionError("a forward pass")

    monkeypatch.setattr(base.model, "forward", refuse)
    assert bytes_of(measured(base, adapters)) == bytes_of(first)


def test_a_new_adapter_costs_nothing_of_the_others(base, adapters, tiny_library, tmp_path):
    first = measured(base, adapters)
    for adapter in adapters:  # whoever measures one of these again fails
        (adapter.folder.path / "adapter_model.safetensors").write_bytes(b"gone")
    new = load_library([str(write_tiny_adapter(tmp_path / "new", 9))])
    found = measured(base, [*adapters[:1], *new, *adapters[1:]])
    for name in ("responses", "effect", "confidence"):
        np.testing.assert_array_equal(found[name][:, [0, 2, 3]], first[name])
        np.testing.assert_allclose(found[name][:, [1]], fresh(base, new)[name], rtol=1e-4, atol=1e-6)


def test_what_is_on_no_shortlist_is_not_tried(base, adapters):
    shortlist = np.array([[True, False, False], [False, False, True]])
    found = Calibration(base).trials(adapters, shortlist)
    for values in (found.effect, found.confidence):
        np.testing.assert_array_equal(np.isnan(values).any(0), [False, True, False])
        np.testing.assert_array_equal(np.isnan(values).all(0), [False, True, False])


def test_the_same_weights_at_another_size_are_tried_anew(base, tmp_path):
    small, large = (
        load_library([str(write_tiny_adapter(tmp_path / f"{alpha}", 1, 4, alpha=alpha))]) for alpha in (1, 16)
    )
    assert small[0].sha256 == large[0].sha256
    tried = measured(base, small)["effect"]
    found = measured(base, large)["effect"]
    np.testing.assert_allclose(found, fresh(base, large)["effect"], rtol=1e-4)
    assert (found > 1.1 * tried).any()


@pytest.mark.parametrize("keep", [0, 7, 0.5])
@pytest.mark.parametrize("name", ["means", "base", "*.responses", "*.trials"])
def test_a_broken_file_is_measured_again(base, adapters, cache, name, keep):
    first = measured(base, adapters)
    files = list(cache.glob(f"calibration/*/{name}.safetensors"))
    assert len(files) == (3 if "*" in name else 1)
    whole = {file: file.read_bytes() for file in files}
    for file, data in whole.items():
        file.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else keep])
    assert_close(measured(base, adapters), first)
    for file, data in whole.items():  # and kept again
        assert len(file.read_bytes()) == len(data)
    left = [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
    assert not left


def test_another_limit_or_other_texts_have_another_folder(base, monkeypatch):
    folders = [Calibration(base, limit).folder for limit in (None, 9, 10)]
    monkeypatch.setattr("router.routing.calibration.generic_prompts", lambda: TEXTS[:-1])
    folders.append(Calibration(base).folder)
    assert len(set(folders)) == 4
    assert Calibration(base).folder == folders[-1]


def other_norm(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def other_words(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    settings = json.loads(tokenizer.to_str())
    settings["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("change", [other_norm, other_words])
def test_the_same_weights_under_another_config_or_tokenizer_share_nothing(tiny_base, base, tmp_path, change):
    shutil.copytree(tiny_base, tmp_path / "other")
    change(tmp_path / "other")
    other = load_base(str(tmp_path / "other"), "cpu", "float32")
    ours, theirs = ((b.model, encode(b.tokenizer, TEXTS)) for b in (base, other))
    assert not torch.equal(last_of(*ours, 0).confidence, last_of(*theirs, 0).confidence)
    assert Calibration(other).folder != Calibration(base).folder
