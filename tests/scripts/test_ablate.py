"""The figures of the ablations are those of labels, and no library has a say in its own constants."""

import numpy as np
import pytest

from router.routing.gate import PrototypeGate
from scripts.docs import ablate


def drawn(name, seed, n=12, rise=1.6):
    """A library of three adapters; every query responds most to the adapter that its number says."""
    rng = np.random.default_rng(seed)
    splits = np.repeat(["own", "unseen", "mc", "none", "foreign", "flan"], n)
    responses = rng.uniform(0.2, 0.4, (len(splits), 3, 6, 2)).astype(np.float32)
    fits = np.isin(splits, ablate.FITS)
    for q in np.flatnonzero(fits):
        responses[q, q % 3] *= rise
    labels = np.where(fits, np.array(list("abc"))[np.arange(len(splits)) % 3], "base")
    reference = rng.uniform(0.2, 0.4, (60, 3, 6, 2)).astype(np.float32)
    sure = [rng.normal(-2, 0.1, count).astype(np.float32) for count in (60, len(splits))]
    return ablate.Measured(
        name, ["a", "b", "c", "base"], reference, sure[0], responses, sure[1], labels, splits
    )


@pytest.fixture(scope="module")
def found():
    return [drawn("one", 0), drawn("two", 1), drawn("three", 2, rise=1.3)]


def test_the_gates_own_constants_are_among_those_that_are_tried():
    assert all(value in ablate.TRIED[name] for name, value in ablate.constants().items())


def test_figures_are_those_of_the_gate_with_its_own_constants(found):
    of = found[2]
    gate = of.fitted()
    candidates = gate.candidate_scores(gate.judge(of.responses), of.confidence)
    lead = candidates[:, :-1].max(1) - candidates[:, -1]
    best = np.array(list("abc"))[candidates[:, :-1].argmax(1)]
    harm = np.sort(lead[of.labels == "base"])[::-1][int(0.05 * (of.labels == "base").sum())]
    sent = (lead > harm) & (best == of.labels)
    shares = ablate.figures(of, ablate.constants())
    for split in ablate.FITS:
        assert shares[split] == sent[of.splits == split].mean()
    assert shares["unseen"] > 0
    assert shares["own right"] == (best == of.labels)[of.splits == "own"].mean()


def test_constants_stay_as_they_are_after_others_were_tried(found):
    before = ablate.constants()
    ablate.figures(found[0], before | {"FACTORS": 1, "SHRINK": 0.6, "RIDGE": 10.0})
    assert ablate.constants() == before


def test_each_library_is_shown_under_what_the_others_choose(found, monkeypatch):
    asked = []

    def spied(others):
        asked.append([of.name for of in others])
        return ablate.constants()

    monkeypatch.setattr(ablate, "chosen_by", spied)
    lines = ablate.left_out(found)
    assert asked == [["two", "three"], ["one", "three"], ["one", "two"]]
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "one",
        "two",
        "three",
        "**mean**",
        "**worst**",
    ]
    cells = [[float(cell) for cell in line.split("|")[3:-1]] for line in lines[2:]]
    np.testing.assert_allclose(cells[3], np.mean(cells[:3], 0), atol=1e-3)
    np.testing.assert_allclose(cells[4], np.min(cells[:3], 0), atol=1e-3)


def test_what_is_chosen_is_best_for_those_who_choose(found, monkeypatch):
    now = ablate.constants()
    monkeypatch.setattr(ablate, "every", lambda: [now | {"DOUBT": doubt} for doubt in (0.0, 0.5, 1.0)])
    chosen = ablate.chosen_by(found[:2])
    means = [np.mean([ablate.figures(of, one)["unseen"] for of in found[:2]]) for one in ablate.every()]
    assert np.mean([ablate.figures(of, chosen)["unseen"] for of in found[:2]]) == max(means)


def test_the_details_have_all_libraries_and_the_operating_point(found):
    text = "\n".join(ablate.details(found))
    assert all(f"| {of.name} |" in text for of in found)
    assert f"{PrototypeGate().false_alarm:g} **(as it is)**" in text


def test_weights_that_are_as_often_right_as_they_say_have_no_gap(found):
    lines = ablate.reliability(found[:1])
    said, came = (float(part) for part in lines[2].split("|")[-3].split(":"))
    assert 0.95 <= said <= 1 and came > 0.9
