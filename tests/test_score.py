"""An answer's score, by hand."""

import math

import pytest

from scripts.bench.score import score


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
