"""One query's story: every number against the run's files, the sentence against runs made by hand."""

import json
import subprocess
import sys

import numpy as np
import pytest

from helpers import NAMES, NONE, ROOT, read_by_id, write_run
from router.cli import main as cli


def main(words):
    return cli(["explain", *words])


WEIGHTS = [0.7, 0.29, 0, 0.01]


def story(capsys, *argv):
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def text(capsys, *argv):
    assert main([*map(str, argv)]) == 0
    return capsys.readouterr().out


def error(capsys, *argv):
    capsys.readouterr()  # a slow run before it says how long its stages took
    assert main([*map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_every_number_is_that_of_the_files(capsys, tmp_path):
    out = write_run(tmp_path / "run", [[1, 0, 0, 0], WEIGHTS], {})
    found = story(capsys, out, "q1")
    keys = ("name", "weight", "score", "response")
    rows = [("one", 0.7, 3.0, 0.1), ("two", 0.29, 2.4, 0.2), ("base", 0.01, 0.8, 0), ("three", 0, -1.0, 0.05)]
    for candidate, row in zip(found["candidates"], rows, strict=True):
        assert candidate == pytest.approx(dict(zip(keys, row, strict=True)))
    assert (found["query"]["input"], found["answer"], found["file"]) == ("Question q1?", "answer q1", "run")
    mix = {"one": 0.7, "two": 0.29, "three": 0, "base": 0.01}
    made = {"folder": "variants/1", "queries": 1, "weights": mix, "sha256": ""}
    assert found["variant"] == {"number": 1, **made}


def test_the_text_is_plain_and_fits(capsys, runs):
    out = runs("proto_route")
    shown, row = text(capsys, out, "m1"), read_by_id(out / "queries.routing.csv")["m1"]
    assert "\x1b" not in shown and max(map(len, shown.splitlines())) <= 100
    assert "Which is a fruit, stone or pear?" in shown and "0: stone" in shown and "1: pear" in shown
    prediction = read_by_id(out / "queries.csv")["m1"]["prediction"]
    assert f"Answer\n  {prediction}: {['stone', 'pear'][int(prediction)]}" in shown
    lines = {words[0]: words for words in map(str.split, shown.splitlines()) if words}
    assert all(float(lines[name][1]) == pytest.approx(float(row[name]), abs=6e-4) for name in NAMES)
    assert f"Variant {row['variant']}" in shown and "_proj " in shown


SENTENCES = {
    "clear": (WEIGHTS, {}, ["one has 0.70", "3.00", "0.80", "two, is 0.60", "two had"]),
    "strongest from the start": ([0.9, 0.09, 0, 0.01], {"responses": [0.3, 0.2, 0.1]}, ["it had"]),
    "a low margin": ([0.7, 0.3, 0, 0], {"scores": [3.0, 2.6, -1.0]}, ["two, is 0.40"]),
    "a low margin over the base model": (
        [0.7, 0.1, 0, 0.2], {"base_score": 2.8}, ["2.80", "the base model, is 0.20"],
    ),
    "base": (
        [0.1, 0.05, 0, 0.85], {"base_score": 4.25}, ["the base model has 0.85", "4.25", "one, is 1.25"],
    ),
    "base, a low margin": (
        [0.3, 0.1, 0, 0.6], {"scores": [NONE, 2.4, -1.0], "base_score": 2.75}, ["two, is 0.35"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SENTENCES)
def test_the_sentence_says_how_clear_it_is_and_why(capsys, tmp_path, kind):
    weights, changed, parts = SENTENCES[kind]
    summary = story(capsys, write_run(tmp_path / "run", [weights], changed), "q0")["summary"]
    assert all(part in summary for part in parts) and ("low margin" in summary) == ("low margin" in kind)


def test_a_variant_that_leans_elsewhere_is_told(capsys, tmp_path):
    variants = [{"folder": "variants/0", "queries": 2, "weights": {"one": 0.3, "two": 0.7, "base": 0}}]
    shown = text(capsys, write_run(tmp_path / "run", [[0.55, 0.45, 0, 0]], variants=variants), "q0")
    assert "but two has more" in shown and "two 0.700, one 0.300\n" in shown


def test_votes_by_kind_of_module(capsys, tmp_path):
    # Layers 0 to 5, in each a q_proj and an up_proj; where the adapter has no prototype there is no vote.
    votes = [1, 2, 3, 4, NONE, 6, 7, 8, -9, -30, -11, NONE]
    out = write_run(tmp_path / "run", [WEIGHTS], {"votes": votes, "scores": [2.0, 2.4, -1.0]})
    found = story(capsys, out, "q0")["votes"]
    assert found["adapter"] == "two"
    assert found["means"] == [
        {"modules": "self_attn.q_proj", "mean": -9 / 5}, {"modules": "mlp.up_proj", "mean": -10 / 5},
    ]  # fmt: skip


def test_of_many_adapters_those_that_matter_are_shown(capsys, tmp_path):
    names = [f"a{n:02}" for n in range(40)]
    scores = 4 - np.arange(40) / 10
    scores[30] = NONE  # a duplicate
    changed = {"responses": np.arange(40) / 40, "scores": scores}  # the last has the strongest response
    weights = [0.5, *[0.0] * 27, 0.5, *[0.0] * 12]
    out = write_run(tmp_path / "run", [weights], changed, names=names)
    rows = [line.split()[0] for line in text(capsys, out, "q0").splitlines() if line.count(".") == 3]
    assert rows == ["a00", "a28", *names[1:7], "base", "a39"]
    found = [row["name"] for row in story(capsys, out, "q0")["candidates"]]
    assert sorted(found) == sorted({*names, "base"} - {"a30"})


@pytest.mark.parametrize(
    ("method", "sentence"),
    [("base", "the base model has 1.00"), ("average", "3 candidates have 0.33"), ("arrow", "averaged")],
)
def test_a_run_without_evidence_shows_what_there_is(capsys, runs, method, sentence):
    found, shown = story(capsys, runs(method), "g3"), text(capsys, runs(method), "g3")
    assert sentence in found["summary"] and found["votes"] is None
    assert all(candidate.keys() == {"name", "weight"} for candidate in found["candidates"])
    assert "response" not in shown


def test_text_from_files_is_shown_and_not_obeyed(capsys, tmp_path):
    query = "[bold]x[/bold] [/nothing] :smile: \x1b[31mred\x07 été\nNext " + "word " * 200 + "the end"
    out = write_run(tmp_path / "run", [WEIGHTS], {}, inputs=[query])
    shown = text(capsys, out, "q0")
    assert "\x1b" not in shown and r"[bold]x[/bold] [/nothing] :smile: \x1b[31mred\x07 été" in shown
    assert "…" in shown and shown.count("word") < 200
    assert story(capsys, out, "q0")["query"]["input"] == query
    (tmp_path / "run.csv").unlink()  # the rest is told without it
    assert story(capsys, out, "q0")["query"] is None and "answer q0" in text(capsys, out, "q0")


def test_an_id_is_found_or_the_nearest_is_named(capsys, runs, tmp_path):
    out = runs("proto_route")
    for stem, asked in (("queries", "What is two and two?"), ("more", "1 + 1 =")):
        found = story(capsys, out, f"{stem}:g1")
        assert found["file"] == stem and found["query"]["input"] == asked
        assert found["answer"] == read_by_id(out / f"{stem}.csv")["g1"]["prediction"]
    for asked, named in (("g1", "more:g1"), ("m11", "'m1'"), ("mare:g1", "'more:g1'"), ("???", "'g1'")):
        assert named in error(capsys, out, asked)
    assert "none/run.json: " in error(capsys, tmp_path / "none", "g1")


def test_no_model_library_is_loaded():
    code = "import sys, router.runs.explain, router.runs.compare\n"
    code += "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
