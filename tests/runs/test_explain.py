"""One query's story: every number against the run's files, the sentence against runs made by hand."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from helpers import NAMES, NONE, ROOT, arguments, read_by_id, write_queries, write_run
from router.main import main as run
from router.runs.explain import main
from router.system.errors import InputError

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
    keys = ("name", "response", "rank", "score", "weight")
    rows = [
        ("one", 0.1, 2, 3.0, 0.7),
        ("two", 0.2, 1, 2.4, 0.29),
        ("three", 0.05, 3, -1.0, 0.0),
        ("base", None, None, 0.8, 0.01),
    ]
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
    assert all(float(lines[name][-1]) == pytest.approx(float(row[name]), abs=6e-4) for name in NAMES)
    assert f"Variant {row['variant']}" in shown and "_proj " in shown and "first third" in shown


SENTENCES = {
    "clear": (
        WEIGHTS, {}, "one has 0.70 of the weight; it scores 3.00; "
        "the base model stands at 0.80; "
        "two had the strongest response before calibration",
    ),
    "strongest from the start": (
        [0.9, 0.09, 0, 0.01], {"responses": [0.3, 0.2, 0.1]}, "; it had the strongest response before",
    ),
    "a low margin": (
        [0.7, 0.3, 0, 0], {"scores": [3.0, 2.6, -1.0]},
        "at 0.80; its margin is low: two is only 0.40 behind; two had the strongest",
    ),
    "a low margin over the base model": (
        [0.7, 0.1, 0, 0.2], {"base_score": 2.8},
        "at 2.80; its margin is low: the base model is only 0.20 behind;",
    ),
    "base": (
        [0.1, 0.05, 0, 0.85], {"base_score": 4.25},
        "the base model has 0.85 of the weight; no adapter scores above the base model, "
        "which stands at 4.25; the nearest is one at 3.00; two had the strongest response before",
    ),
    "base, a low margin": (
        [0.3, 0.1, 0, 0.6], {"scores": [NONE, 2.4, -1.0], "base_score": 2.75},
        "the nearest is two at 2.40; its margin is low: two is only 0.35 behind;",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", SENTENCES)
def test_the_sentence_says_how_clear_it_is_and_why(capsys, tmp_path, kind):
    weights, changed, sentence = SENTENCES[kind]
    summary = story(capsys, write_run(tmp_path / "run", [weights], changed), "q0")["summary"]
    assert sentence in summary and ("margin" in summary) == ("low margin" in kind)


def test_a_variant_that_leans_elsewhere_is_told(capsys, tmp_path):
    variants = [{"folder": "variants/0", "queries": 2, "weights": {"one": 0.3, "two": 0.7, "base": 0}}]
    shown = text(capsys, write_run(tmp_path / "run", [[0.55, 0.45, 0, 0]], variants=variants), "q0")
    assert "one has 0.55 of the weight; but two has more in the variant that answered.\n" in shown
    assert "Variant 0, which answers 2 queries\n  two 0.700, one 0.300\n" in shown


def test_votes_by_kind_and_by_third_of_depth(capsys, tmp_path):
    # Layers 0 to 5, in each a q_proj and an up_proj; where the adapter has no prototype there is no vote.
    votes = [1, 2, 3, 4, NONE, 6, 7, 8, -9, -10, -11, NONE]
    out = write_run(tmp_path / "run", [WEIGHTS], {"votes": votes, "scores": [2.0, 2.4, -1.0]})
    found = story(capsys, out, "q0")["votes"]
    assert found["adapter"] == "two"
    assert [(part["count"], part["mean"]) for part in found["means"]] == [
        (5, -9 / 5), (5, 2), (4, 10 / 4), (3, 21 / 3), (3, -30 / 3),
    ]  # fmt: skip
    lines = {line.strip()[:10]: line for line in text(capsys, out, "q0").splitlines()}
    assert lines["last third"].count("-") == 21 and "-10.000" in lines["last third"]  # a sign and 20
    assert lines["middle thi"].count("#") == 14


def test_a_duplicate_has_no_score_of_its_own(capsys, tmp_path):
    changed = {"responses": [0.1, 0.2, 0.9], "scores": [3, 2.4, NONE]}
    shown = text(capsys, write_run(tmp_path / "run", [WEIGHTS], changed), "q0")
    assert ["three", "0.900", "1", "0.000"] in map(str.split, shown.splitlines())


def test_of_many_adapters_those_that_matter_are_shown(capsys, tmp_path):
    names = [f"a{n:02}" for n in range(40)]
    changed = {
        "responses": np.arange(40) / 40,  # the last has the strongest response
        "scores": 4 - np.arange(40) / 10,
    }
    weights = [0.5, *[0.0] * 27, 0.5, *[0.0] * 12]
    out = write_run(tmp_path / "run", [weights], changed, names=names)
    rows = [line.split()[0] for line in text(capsys, out, "q0").splitlines() if line.count(".") == 3]
    assert rows == [*names[:8], "a28", "a39"] and len(story(capsys, out, "q0")["candidates"]) == 41


@pytest.mark.parametrize(
    ("method", "sentence"),
    [("base", "the base model has 1.00"), ("average", "3 candidates have 0.33 of the weight each"),
     ("arrow", "averaged over tokens, since the adapters are mixed anew for each token")],
)  # fmt: skip
def test_a_run_without_evidence_shows_what_there_is(capsys, runs, method, sentence):
    found, shown = story(capsys, runs(method), "g2"), text(capsys, runs(method), "g2")
    assert sentence in found["summary"] and found["votes"] is None
    assert all(candidate.keys() == {"name", "weight"} for candidate in found["candidates"])
    assert "kept no evidence" in shown and "response" not in shown


def test_text_from_files_is_shown_and_not_obeyed(capsys, tmp_path):
    query = "[bold]x[/bold] [/nothing] :smile: \x1b[31mred\x07 été\nNext " + "word " * 200 + "the end"
    out = write_run(tmp_path / "run", [WEIGHTS], {}, inputs=[query])
    shown = text(capsys, out, "q0")
    assert "\x1b" not in shown and r"[bold]x[/bold] [/nothing] :smile: \x1b[31mred\x07 été" in shown
    assert " more ...] " in " ".join(shown.split()) and "the end" in shown and shown.count("word") < 200
    assert story(capsys, out, "q0")["query"]["input"] == query


def test_a_query_file_that_is_gone_leaves_the_rest(capsys, tmp_path):
    out = write_run(tmp_path / "run", [WEIGHTS], {})
    (tmp_path / "run.csv").unlink()
    assert story(capsys, out, "q0")["query"] is None
    shown = text(capsys, out, "q0")
    assert "the query file is gone or has changed" in shown and "answer q0" in shown
    assert "expected the query's text" in error(capsys, out, "q0", "--answers")


def test_the_base_models_answer_beside_the_variants(capsys, runs):
    out, without = runs("proto_route"), runs("base")
    for own in ("g2", "m1"):
        expected = read_by_id(without / "queries.csv")[own]["prediction"]
        assert story(capsys, out, own, "--answers")["base_answer"] == expected
    assert "Answer of the base model\n  " in text(capsys, out, "m1", "--answers")


@pytest.fixture()
def copied(runs, tmp_path):
    """A run whose files may be changed."""
    return shutil.copytree(runs("proto_route"), tmp_path / "copied")


def changed(out, **parts):
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(
        json.dumps({key: of | parts.get(key, {}) if key in parts else of for key, of in record.items()})
    )


def test_other_weights_than_the_runs_do_not_answer_for_its_base_model(capsys, copied, tiny_base, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    weights = load_file(tiny_base / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    changed(copied, base={"name": str(other)})
    assert "other weights" in error(capsys, copied, "g2", "--answers")


@pytest.mark.parametrize(
    ("base", "device", "asked"),
    [
        ({"name": "some/base", "revision": "abc"}, "cpu", ("some/base@abc", "cpu", "float16")),
        ({"name": "HuggingFaceTB/SmolLM2-135M-Instruct"}, "cuda:0", ("embedded", "auto", "float16")),
        (
            {"name": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "abc"},
            "cuda:0",
            ("HuggingFaceTB/SmolLM2-135M-Instruct@abc", "auto", "float16"),
        ),
    ],
)
def test_the_base_model_is_asked_for_as_the_run_had_it(capsys, copied, monkeypatch, base, device, asked):
    """`main` may have moved on since, and another dtype or device may give another answer."""

    def load(*how):
        raise InputError(f"asked for {how}")

    monkeypatch.setattr("router.model.base.load_base", load)
    changed(copied, base={**base, "dtype": "float16", "device": device}, flags={"base_model": "some/base"})
    assert f"asked for {(*asked, None)}" in error(capsys, copied, "g2", "--answers")


@pytest.mark.parametrize(
    ("flag", "value"), [("max_gen_len", None), ("max_seq_len", "ten"), ("scoring", "best"), ("adapters", [7])]
)
def test_a_flag_that_is_missing_or_unknown_is_named(capsys, copied, flag, value):
    changed(copied, flags={flag: value})
    told = error(capsys, copied, "g2", "--answers")
    assert "run.json" in told and f"({flag}" in told


def test_an_id_is_found_or_the_nearest_is_named(capsys, runs, tmp_path):
    out = runs("proto_route")
    assert "queries:g1 or more:g1" in error(capsys, out, "g1")
    for stem, asked in (("queries", "What is two and two?"), ("more", "1 + 1 =")):
        found = story(capsys, out, f"{stem}:g1")
        assert found["file"] == stem and found["query"]["input"] == asked
        assert found["answer"] == read_by_id(out / f"{stem}.csv")["g1"]["prediction"]
    assert "such as 'm1', got 'm11'" in error(capsys, out, "m11")
    assert "such as 'more:g1', got 'mare:g1'" in error(capsys, out, "mare:g1")
    assert "such as 'g1', got '???'" in error(capsys, out, "???")
    assert "none/run.json: " in error(capsys, tmp_path / "none", "g1")


def test_an_id_that_reads_like_another_files_is_told(capsys, tmp_path, tiny_base, tiny_library):
    one = write_queries(tmp_path / "a.csv", [("b:1", "x", "generation", "")])
    two = write_queries(tmp_path / "a:b.csv", [("1", "y", "generation", ""), ("2", "z", "generation", "")])
    out = tmp_path / "out"
    assert run(arguments("base", [one, two], tiny_library, tiny_base, out)) == 0
    capsys.readouterr()
    assert "stands in 2 query files" in error(capsys, out, "a:b:1")
    assert story(capsys, out, "2")["query"]["input"] == "z"


@pytest.mark.parametrize("module", ["router.runs.explain", "router.runs.compare"])
def test_no_model_library_is_loaded(module):
    code = f"import sys, {module}; assert not {{'torch', 'transformers', 'peft'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
