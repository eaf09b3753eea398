"""Shares of right answers and of right adapters, counted by hand."""

import json
import math

import pytest

from helpers import write_csv
from scripts.bench.score import main, score


@pytest.fixture()
def labels(tmp_path):
    (tmp_path / "labels").mkdir()
    rows = [(n, answer, "maths", "sums") for n, answer in enumerate(["4", "7", "", "NA"])]
    write_csv(tmp_path / "labels" / "sums.csv", ("id", "target", "skill", "adapter"), rows)
    return tmp_path / "labels"


@pytest.fixture()
def run(tmp_path):
    def finished(name, method, predictions, sums=None):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"method": method}))
        rows = list(enumerate(predictions))[::-1]  # upside down: rows are found by their id
        write_csv(folder / "sums.csv", ("id", "prediction"), rows)
        if sums is not None:
            rows = [(n, 0, weight, 1 - weight) for n, weight in enumerate(sums)]
            write_csv(folder / "sums.routing.csv", ("id", "variant", "sums", "base"), rows)
        return folder

    return finished


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


def test_what_nobody_can_judge_has_no_score():
    assert math.isnan(score("none", "anything", ""))
    with pytest.raises(ValueError, match="expected exact"):
        score("bleu", "a", "a")


def test_runs_are_scored_side_by_side(capsys, monkeypatch, labels, run):
    routed = run("one", "proto_route", ["4", " 7 ", "", "nan"], [1.0, 0.75, 0.25, 1.0])
    oracle = run("two", "oracle", ["4", "7", "", "NA"])
    monkeypatch.setattr("sys.argv", ["score", str(labels), str(routed), str(oracle)])
    main()
    assert capsys.readouterr().out.splitlines() == [
        "| task | skill | proto_route | oracle |",
        "| --- | --- | ---: | ---: |",
        "| sums | maths | 0.75 | 1.00 |",
        "| **mean over tasks** | | 0.750 | 1.000 |",
        "| share of the oracle | | 0.750 | 1.000 |",
        "| routing accuracy | | 0.750 | nan |",
    ]


def test_a_folder_without_a_finished_run_is_named(capsys, monkeypatch, labels, tmp_path):
    monkeypatch.setattr("sys.argv", ["score", str(labels), str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and str(tmp_path) in capsys.readouterr().err
