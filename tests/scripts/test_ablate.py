"""The rows of the ablations are settings of the package's gate, and their shares are of the labels."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
import torch

from router.library.adapters import load_library
from router.model.answer import encode, generate
from router.model.apply import active
from router.model.base import load_base
from router.routing.gate import PrototypeGate
from scripts.bench.development import Labelled
from scripts.docs import ablate
from scripts.docs.trials import TOKENS, Tried, tried

MODULES = [f"model.layers.{layer}.mlp.up_proj" for layer in range(6)]


def drawn(name, seed, splits):
    """A library of three adapters; every query responds most to the adapter that its number says."""
    rng = np.random.default_rng(seed)
    responses = rng.uniform(0.2, 0.4, (len(splits), 3, 6, 2))
    for n, split in enumerate(splits):
        if split not in ablate.NOBODY:
            responses[n, n % 3] *= 2
    labels = ["base" if split in ablate.NOBODY else "abc"[n % 3] for n, split in enumerate(splits)]
    reference, sure = rng.uniform(0.2, 0.4, (60, 3, 6, 2)), rng.normal(-2, 0.1, 60)
    candidates, confidence = ["a", "b", "c", "base"], rng.normal(-2, 0.1, len(splits))
    tasks = np.array(["few_shot" if split == "foreign" else "task" for split in splits])
    unwritten = reference, responses
    splits = np.array(splits)
    return ablate.Measured(
        name,
        candidates,
        MODULES,
        reference,
        sure,
        responses,
        confidence,
        unwritten,
        dict.fromkeys(ablate.POWERS, unwritten),
        {},
        labels,
        splits,
        tasks,
    )


@pytest.fixture(scope="module")
def found():
    return [
        drawn("one", 0, ["own"] * 12 + ["unseen"] * 12 + ["none"] * 10 + ["foreign"] * 10),
        drawn("two", 1, ["own"] * 6 + ["mc"] * 6),
    ]


@pytest.fixture(scope="module")
def tables(found):
    """By heading, the cells of each row by its title."""
    parts = "\n".join(ablate.page(found)).split("\n## ")[1:]
    return [
        {
            cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
            for cells in (line.split("|") for line in part.splitlines() if line.startswith("|"))
        }
        for part in parts
    ]


def test_a_row_has_the_shares_of_all_libraries_side_by_side_and_the_worst(found, tables):
    which, fits, *_ = tables
    columns = ["own: one", "own: two", "unseen: one", "mc: two", "own: worst", "unseen: worst", "mc: worst"]
    assert which["gate"] == columns
    assert which["**as it is**"] == ["1.000"] * 7
    now = next(cells for title, cells in fits.items() if "as it is" in title)
    gate = PrototypeGate().fit(found[0].reference, confidence=found[0].reference_confidence)
    raised = (found[0].confidence - found[0].reference_confidence.mean())[24:34]
    level = gate.level_ + raised / found[0].reference_confidence.std(ddof=1)
    left = (gate.decision_function(found[0].responses[24:34]).max(1) <= level).mean()
    assert now[fits["gate"].index("none: one")] == f"{left:.3f}"


def test_a_rarer_false_alarm_leaves_more_to_the_base_model(found, tables):
    rows = [
        cells for title, cells in tables[1].items() if title.startswith("false_alarm") and "," not in title
    ]
    assert len(rows) == len(ablate.SHARES)
    left = [float(cells[tables[1]["gate"].index("none: one")]) for cells in rows]
    assert all(rare >= common for rare, common in pairwise(left)) and left[0] > left[-1]
    measured = [float(tables[4][f"{share:g}"][0]) for share in ablate.SHARES]  # of few-shot prompts
    assert tables[4]["promised"][0] == "few-shot: one" and sorted(measured) == measured
    assert measured[0] < measured[-1]


def test_a_weight_is_compared_with_how_often_it_is_right(found):
    one = found[0]
    *_, line = ablate.reliability([one], temperature=1e-6)  # every weight is 1
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    top = one.fitted().predict(one.responses, one.confidence)
    share = np.nanmean(one.shares(top))
    assert cells == ["one", "", "", "", "", f"1.00: {share:.2f}", f"{1 - share:.3f}"]


def test_what_candidates_write_counts_where_several_are_close(found):
    one = found[0]
    twins = one.responses.copy()
    twins[:, 1] = twins[:, 0] = twins[:, :2].max(1)  # two adapters that cannot be told apart
    one = replace(one, responses=twins)
    pairs = ablate.close(one)
    assert pairs and {k for _, k in pairs} == {0, 1} and all(one.splits[q] in ablate.FITS for q, _ in pairs)
    second = replace(one, tried={(q, k): Tried(0.0, 400.0 * k, 0.0) for q, k in pairs})
    own = one.shares(one.fitted().predict(one.responses, one.confidence))
    *rows, _, passes = ablate.written([second])
    share = {row.split("|")[1].strip(): float(row.split("|")[2]) for row in rows[2:]}
    asked = [q for q, k in pairs if k == 1 and one.splits[q] == "own"]
    others = [q for q in np.flatnonzero(one.splits == "own") if q not in asked]
    right = one.right(one.fitted().predict(one.responses, one.confidence))
    expected = (sum(one.labels[q] == "b" for q in asked) + right[others].sum()) / 12
    assert share["0.05 of how likely it is to the base model"] == pytest.approx(expected, abs=1e-3)
    assert (
        share["nothing **(as it is)**"]
        == share["0.05 of how likely it is to the adapter"]
        == pytest.approx(own[0], abs=1e-3)
    )
    assert passes == f"Passes for each query: one {len(pairs) / 24:.2f}."


def test_what_an_adapter_writes_has_the_likelihood_that_peft_gives_it(tiny_base, tiny_library):
    base, adapters = load_base(str(tiny_base), dtype="float32"), load_library([str(tiny_library)])
    rows, others = (
        encode(base.tokenizer, ["What is it?", "Where was it?"]),
        encode(base.tokenizer, ["a", "b: c"]),
    )
    seen = tried(base, adapters, rows, others, [(0, 2), (1, 0), (1, 2)])

    def likelihood(model, prompt, text):
        logits = model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
        return float(logits.double().log_softmax(-1)[torch.arange(len(text)), list(text)].sum())

    for (q, k), found in seen.items():
        with torch.inference_mode():
            with active(base, adapters[k].folder.path, "beside") as model:
                text = generate(model, base.tokenizer, [rows[q]], TOKENS)[0].ids
                assert found.own == pytest.approx(likelihood(model, rows[q], text), abs=1e-3)
            plain = [likelihood(base.model, row, text) for row in (rows[q], *others)]
        assert found.base == pytest.approx(plain[0], abs=1e-3)
        assert found.elsewhere == pytest.approx(sum(plain[1:]) / 2, abs=1e-3)


def test_the_curve_has_a_line_and_a_point_for_each_library(found, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra notebook")
    monkeypatch.setattr(ablate, "CURVE", tmp_path / "trade.svg")
    for _ in range(2):
        ablate.curve(found[:1])
        text = (tmp_path / "trade.svg").read_text("utf-8")
        assert ">one</text>" in text
    sent = [ablate._sent(found[0], gate := found[0].fitted(), level) for level in (-50.0, 50.0)]
    assert sent == [(1.0, 1.0), (0.0, 0.0)] and gate.level_ > 0


def test_another_filter_makes_other_scores_and_the_gates_own_the_same(found):
    one = found[0]
    responses = one.reference[:40].copy()
    responses[:, 1, :, 0] *= 1.2  # the whole of a prompt
    responses[:, 2, :, 1] *= 1.6  # its end, by more
    of = replace(one, responses=responses)
    rows = ablate.FILTERS
    assert (ablate.filtered(of, rows["as it is, the whole prompt alone"]).argmax(1) == 1).mean() > 0.9
    end = ablate.filtered(of, rows["as it is, the end and what is written alone"])
    assert (end.argmax(1) == 2).mean() > 0.9
    assert (ablate.filtered(of, rows["equal weights"]).argmax(1) == 2).mean() > 0.9
    own = ablate.filtered(of, lambda gate: gate.filter_)
    np.testing.assert_allclose(own, ablate.scores(of), atol=1e-9)


def test_the_first_layers_are_those_with_the_lowest_numbers(found):
    assert ablate.early(found[0], 1 / 3).tolist() == [True, True, False, False, False, False]


def test_a_library_is_measured_with_its_labels(tiny_base, tiny_library, monkeypatch):
    monkeypatch.setattr(
        "router.routing.calibration.generic_prompts", lambda: ["one", "two: x", "three", "four"]
    )
    rows = [("What is it?", "mlp", "own", "a"), ("Where?", "base", "none", "b")]
    rows = pd.DataFrame(rows, columns=["input", "adapter", "split", "task"])
    of = ablate.measured(Labelled("tiny", tiny_library, str(tiny_base), rows))
    assert of.candidates == ["attention", "everything", "mlp", "base"]
    assert of.responses.shape == (2, 3, len(of.modules), 2) and len(of.reference) == 4
    # A power mean grows with its power, unless all tokens are alike.
    for plain, lower, higher in zip((of.reference, of.responses), *of.powered.values(), strict=True):
        there = np.isfinite(plain)
        assert (lower[there] < plain[there]).all() and (plain[there] < higher[there]).all()
    own, unseen, mc, none, foreign = of.shares(np.array([2, 0]))
    assert (own, none) == (1, 0) and np.isnan([unseen, mc, foreign]).all()
