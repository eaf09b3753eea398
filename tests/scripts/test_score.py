"""Shares of right answers and of right adapters, counted by hand."""

import json
import math

import pytest

from scripts.bench.score import main, right, routed, score


@pytest.fixture()
def labels(tmp_path):
    folder = tmp_path / "labels"
    folder.mkdir()
    rows = [f"{n},{answer},maths,sums" for n, answer in enumerate(["4", "7", "", "NA"])]
    (folder / "sums.csv").write_text("\n".join(["id,target,skill,adapter", *rows]) + "\n")
    return folder


@pytest.fixture()
def run(tmp_path):
    def finished(name, method, predictions, sums=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"method": method}))
        # Upside down: rows are found by their id.
        rows = [f"{n},{answer},0" for n, answer in enumerate(predictions)][::-1]
        (folder / "sums.csv").write_text("\n".join(["id,prediction,dummy_field", *rows]) + "\n")
        if sums is not None:
            rows = [f"{n},0,{weight},{1 - weight}" for n, weight in enumerate(sums)]
            (folder / "sums.routing.csv").write_text("\n".join(["id,variant,sums,base", *rows]) + "\n")
        return folder

    return finished


def test_an_answer_is_right_where_nothing_but_blanks_around_it_differs():
    assert right(" 7\n", "7") and right("", "")
    assert not right("7.", "7") and not right("seven", "Seven")


@pytest.mark.parametrize(
    ("metric", "prediction", "target", "expected"),
    [
        ("exact", " Rome ", "Rome", 1), ("exact", "rome", "Rome", 0), ("mc", "1", "1", 1),
        ("em", "ROME\nand more", "Rome", 1), ("em", "in Rome", "Rome", 0),
        ("contains", "It is rome.", "Rome", 1), ("contains", "woof", "roar|woof", 1),
        ("contains", "They are 14", "4|four", 0), ("contains", "There are four.", "4|four", 1),
    ],
)  # fmt: skip
def test_an_answer_is_scored_by_its_metric(metric, prediction, target, expected):
    assert score(metric, prediction, target) == expected


def test_an_answer_that_nobody_can_judge_has_no_score_and_an_unknown_metric_is_refused():
    assert math.isnan(score("none", "anything", ""))
    with pytest.raises(ValueError, match="expected exact"):
        score("bleu", "a", "a")


def test_rouge_is_that_of_the_longest_common_subsequence():
    pytest.importorskip("rouge_score", reason="needs the extra bench")
    # Four words each, three of them in common and in order.
    assert score("rougeL", "the cat sat down", "the cat fell down") == pytest.approx(0.75)


def test_a_query_is_routed_well_to_one_of_its_adapters_or_a_copy():
    assert routed("sums", "sums") and routed("sums~x4", "sums") and routed("rhymes", "sums+rhymes")
    assert not routed("sum", "sums") and not routed("base", "sums+rhymes") and routed("base", "base")


def printed(capsys, monkeypatch, labels, *runs):
    monkeypatch.setattr("sys.argv", ["score", str(labels), *map(str, runs)])
    main()
    return capsys.readouterr().out.splitlines()


def test_runs_are_scored_side_by_side(capsys, monkeypatch, labels, run):
    routed = run("one", "proto_route", ["4", " 7 ", "", "nan"], [1.0, 0.75, 0.25, 1.0])
    oracle = run("two", "oracle", ["4", "7", "", "NA"])
    assert printed(capsys, monkeypatch, labels, routed, oracle) == [
        "| task | skill | proto_route | oracle |",
        "| --- | --- | ---: | ---: |",
        "| sums | maths | 0.75 | 1.00 |",
        "| **mean over tasks** | | 0.750 | 1.000 |",
        "| share of the oracle | | 0.750 | 1.000 |",
        "| routing accuracy | | 0.750 | nan |",
    ]


def test_two_runs_of_one_method_are_two_columns(capsys, monkeypatch, labels, run):
    one = run("one", "proto_route", ["4", "", "", ""])
    two = run("two", "proto_route", ["4", "7", "", ""])
    head, _, row, *_ = printed(capsys, monkeypatch, labels, one, two)
    assert head == f"| task | skill | proto_route, {one} | proto_route, {two} |"
    assert row == "| sums | maths | 0.50 | 0.75 |"


def test_a_folder_without_a_finished_run_is_named(capsys, monkeypatch, labels, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        printed(capsys, monkeypatch, labels, tmp_path)
    assert stopped.value.code == 2
    assert f"{tmp_path}: expected the output folder of a finished run" in capsys.readouterr().err
