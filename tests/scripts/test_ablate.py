"""The rows of the ablations are settings of the package's gate, on responses that are drawn."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import NAMES
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import load_base
from router.model.passes import truncated
from router.routing.calibration import Calibration
from router.routing.gate import PrototypeGate
from router.routing.prototypes import ModulePrototypes
from scripts.docs import ablate


def test_directions_are_weighted_within_each_adapter():
    owners, shares = torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0.75, 0.25, 1.0, 0.6, 0.4])
    proto = ModulePrototypes(torch.eye(5), shares, owners)
    expected = {
        "first direction": [1, 0, 1, 1, 0],
        "equal": [0.5, 0.5, 1, 0.5, 0.5],
        "S^2": [0.9, 0.1, 1, 0.36 / 0.52, 0.16 / 0.52],
    }
    for name, weights in expected.items():
        changed = ablate.reweighted(proto, ablate.WEIGHTS[name])
        assert changed.weights.tolist() == pytest.approx(weights)
        assert changed.directions is proto.directions


@pytest.fixture()
def drawn():
    """Responses of three adapters to generic text, and to 40 queries that are like it."""
    rng = np.random.default_rng(0)
    return rng.uniform(0.2, 0.4, (60, 3, 8, 2)), rng.uniform(0.2, 0.4, (40, 3, 8, 2))


def test_the_rows_change_the_weight_of_the_end_and_the_false_alarm_and_nothing_else():
    found = [{**PrototypeGate().get_params(), **changed} for changed in ablate.SETTINGS.values()]
    assert {gate["end_weight"] for gate in found} == {0, 0.5, 1}
    assert {gate["false_alarm"] for gate in found} == {0.05, 0.1, 0.2}
    for title, changed in ablate.SETTINGS.items():
        assert len(changed) == (title != "**as it is**")


def test_the_end_decides_as_much_as_it_counts(drawn):
    reference, responses = drawn
    responses[:, 1, :, 0] *= 1.2  # the whole of a prompt
    responses[:, 2, :, 1] *= 1.4  # its end, by more
    assert (ablate.scores(responses, reference, end_weight=0).argmax(1) == 1).mean() > 0.9
    assert (ablate.scores(responses, reference, end_weight=1).argmax(1) == 2).mean() > 0.9


def test_the_base_model_loses_no_query_as_fewer_false_alarms_are_allowed(drawn):
    reference, responses = drawn
    left = [ablate.choices(responses, reference, false_alarm=share) == 3 for share in (0.5, 0.2, 0.1, 0.01)]
    for more, fewer in pairwise(left):
        assert not (more & ~fewer).any()
    assert left[0].mean() < 0.8 < left[-1].mean()


def test_the_page_has_a_row_for_each_setting_and_its_shares_are_of_the_labels(
    tiny_base, tiny_library, monkeypatch, capsys
):
    """On the tiny model, with the labels that the gate itself gives and five queries without an adapter."""
    base = load_base(str(tiny_base), "cpu", "float32")
    texts = [f"{'word ' * (n % 20)}{n}: is it so?" for n in range(1, 101)]
    monkeypatch.setattr("router.routing.calibration.generic_prompts", lambda: texts[:80])
    monkeypatch.setattr(ablate, "LIBRARY", tiny_library)
    monkeypatch.setattr(ablate, "load_base", lambda spec: base)
    monkeypatch.setattr("sys.argv", ["ablate"])
    calibration = Calibration(base)
    rows = [*calibration.rows, *truncated(encode(base.tokenizer, texts[80:]))]
    measured, _ = ablate.measure(base, load_library([str(tiny_library)]), rows)
    reference, responses = np.split(measured["**as it is**"], [80])
    gate = PrototypeGate().fit(reference)
    own = [NAMES[n] for n in gate.decision_function(responses).argmax(1)][:15] + ["base"] * 5
    left = gate.predict(responses) == 3
    labels = pd.DataFrame({"input": texts[80:], "adapter": own})
    monkeypatch.setattr(ablate, "labelled", lambda name: labels)
    ablate.main()
    parts = capsys.readouterr().out.split("## ")[1:]
    first, second = (
        {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in part.splitlines()[4:])}
        for part in parts
    )
    assert first["**as it is**"] == first[ablate.END.format(0.5)] == ["1.000", "1.000"]
    assert {ablate.END.format(weight) for weight in (0, 0.5, 1)} < set(first)
    assert [title for title in second if title] == list(ablate.SETTINGS)
    kept = f"{1 - left[:15].mean():.3f}"
    for title in ("**as it is**", "at most 10% false alarms", ablate.END.format(0.5)):
        assert second[title] == [kept, kept, f"{left[15:].mean():.3f}"]
