"""The Python interface: it does what the command does, and refuses questions that are none."""

import numpy as np
import pytest

from helpers import NAMES, arguments, read_table, write_queries, write_tiny_adapter
from router import Router
from router.kit import Merges
from router.main import main

TEXTS = ["What is two and two?", "1 + 1 =", "Say x"]


@pytest.fixture()
def router(tiny_base, tiny_library):
    how = {"device": "cpu", "dtype": "float32", "max_gen_len": 6}
    return Router.from_library(tiny_library, base_model=str(tiny_base), **how)


def test_it_does_what_the_command_does(router, tiny_base, tiny_library, tmp_path):
    rows, out = [(str(n), text, "generation", "") for n, text in enumerate(TEXTS)], tmp_path / "out"
    queries = write_queries(tmp_path / "queries.csv", rows)
    assert main(arguments("proto_route", [queries], tiny_library, tiny_base, out)) == 0
    answers = [row["prediction"] for row in read_table(out / "queries.csv")]
    routing, weights = read_table(out / "queries.routing.csv"), router.route(TEXTS)
    assert list(weights) == router.candidates == [*NAMES, "base"]
    for row, told in zip(weights.to_dict("records"), routing, strict=True):
        assert row == pytest.approx({name: float(told[name]) for name in row}, abs=1e-6)
    assert [answer.strip() or "unknown" for answer in router.answer(TEXTS)] == [a.strip() for a in answers]


def test_choices_are_answered_with_one_of_them(router):
    choices = [["four", "five"], ["1", "2", "3"], ["x", "y"]]
    for answer, options in zip(router.answer(TEXTS, choices), choices, strict=True):
        assert answer in options


def test_weights_of_a_text_sum_to_one(router):
    np.testing.assert_allclose(router.route(TEXTS).sum(axis=1), 1)


def test_nothing_is_left_behind(router, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    router.answer(TEXTS[:1])
    assert [path.name for path in tmp_path.iterdir()] == ["library"]


def test_a_method_that_only_merges_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("router.api.load_method", lambda name: Merges)
    with pytest.raises(ValueError, match="routes"):
        Router.from_library(write_tiny_adapter(tmp_path / "one", 1))


@pytest.mark.parametrize(
    ("texts", "choices", "message"),
    [
        ("one text", None, "list"),
        ([], None, "at least one"),
        (["a"], [], "choice"),
        (["a"], [[]], "choice"),
        (["a", "b"], ["yes", "no"], "choice"),  # each would be a list of letters
        (["a", "b"], [["yes", "no"], "no"], "choice"),
    ],
)
def test_wrong_questions_are_refused(router, texts, choices, message):
    with pytest.raises(ValueError, match=message):
        router.answer(texts, choices)
