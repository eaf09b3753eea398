import csv

import numpy as np
import pytest
from conftest import write_tiny_adapter

from router import Router
from router.main import main
from router.merges import Merges

TEXTS = ["What is two and two?", "1 + 1 =", "Say x"]


@pytest.fixture()
def router(tiny_base, tiny_library):
    return Router.from_library(tiny_library, base_model=str(tiny_base), device="cpu", max_gen_len=6)


def test_it_does_what_the_command_does(router, tiny_base, tiny_library, tmp_path):
    with (tmp_path / "queries.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "input", "eval_type", "answer_choices"])
        rows.writerows([n, text, "generation", ""] for n, text in enumerate(TEXTS))
    flags = ["--dataset_filepaths", tmp_path / "queries.csv", "--adapters", tiny_library, "--max_gen_len", 6]
    flags += ["--base_model", tiny_base, "--output_folder", tmp_path / "out", "--device", "cpu"]
    assert main(["-m", "proto_route", *map(str, flags)]) == 0
    with (tmp_path / "out" / "queries.csv").open(newline="") as file:
        answers = [row["prediction"] for row in csv.DictReader(file)]
    with (tmp_path / "out" / "queries.routing.csv").open(newline="") as file:
        routing = list(csv.DictReader(file))
    weights = router.route(TEXTS)
    assert list(weights) == ["attention", "everything", "mlp", "base"]
    for row, told in zip(weights.to_dict("records"), routing, strict=True):
        assert row == pytest.approx({name: float(told[name]) for name in row}, abs=1e-6)
    assert [answer.strip() or "unknown" for answer in router.answer(TEXTS)] == [a.strip() for a in answers]


def test_choices_are_answered_with_one_of_them(router):
    choices = [["four", "five"], ["1", "2", "3"], ["x", "y"]]
    for answer, options in zip(router.answer(TEXTS, choices), choices, strict=True):
        assert answer in options
    np.testing.assert_allclose(router.method.weights.sum(1), 1)


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
    [("one text", None, "list"), ([], None, "at least one"), (["a"], [], "choice"), (["a"], [[]], "choice")],
)
def test_wrong_questions_are_refused(router, texts, choices, message):
    with pytest.raises(ValueError, match=message):
        router.answer(texts, choices)
