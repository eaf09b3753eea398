"""The benchmark's settings, cells and statistics, on the tiny model and on numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from router.library.adapters import load_library
from router.methods.proto_route import ProtoRoute
from router.model.base import load_base
from router.settings import Settings
from router.submission import read_queries
from scripts.bench import markdown, runner, score
from scripts.bench.quality import cells, settings, tables
from scripts.bench.quality.per_query import PerQuery

NAMES = ["attention", "everything", "mlp"]


def test_left_out_tasks_miss_their_adapter_and_skewed_mixes_are_skewed():
    class Named:
        def __init__(self, name):
            self.name = name

    tasks = sorted(set(score.labelled("eval")["task"]))
    library = [Named(task) for task in tasks]
    for part in settings.SETTINGS["left_out"].parts():
        assert part.name in tasks and set(part.rows["task"]) == {part.name}
        assert [a.name for a in part.library(library)] == [task for task in tasks if task != part.name]
    for part in settings.SETTINGS["skewed"].parts():
        assert (part.rows["task"] == part.name).mean() == pytest.approx(0.9, abs=0.02)
    singles = settings.SETTINGS["composite_singles"].parts()
    assert all(part.name in row.split("+") for part in singles for row in part.rows["adapter"])


ROWS = pd.DataFrame(
    [("a", "0", "one plus one", "2", "", "generation", "mlp", "maths"),
     ("a", "1", "another question, longer", "x", "", "generation", "mlp", "maths"),
     ("b", "0", "pick", "1", "['no', 'yes']", "multiple_choice", "attention", "chat")],
    columns=["task", "id", "input", "target", "answer_choices", "eval_type", "adapter", "skill"],
)  # fmt: skip


@pytest.fixture()
def tiny_setting(monkeypatch, tiny_base, tiny_library):
    base, adapters = load_base(str(tiny_base), "cpu", "float32"), load_library([str(tiny_library)])
    halves = [settings.Part("first", ROWS[:1]), settings.Part("rest", ROWS[1:])]
    monkeypatch.setattr(cells, "SETTINGS", {"held_in": settings.Setting("held_in", (), lambda: halves)})
    monkeypatch.setattr(cells, "load_base", lambda spec: base)
    monkeypatch.setattr(cells, "load_library", lambda specs: adapters)


@pytest.mark.parametrize("method", ["average", "per_query", "oracle"])
def test_a_cell_has_an_answer_for_each_query_and_what_each_part_cost(tiny_setting, method):
    parts = cells.answer("held_in", method, 0)
    assert [part["part"] for part in parts] == ["first", "rest"]
    assert all(part["variants"] >= 1 and part["seconds"] > 0 and part["peak_mib"] > 0 for part in parts)
    found = pd.DataFrame([row for part in parts for row in part["answers"]], columns=cells.COLUMNS)
    assert list(zip(found.task, found.id, found.adapter, strict=True)) == [
        (row.task, row.id, row.adapter) for row in ROWS.itertuples()
    ]
    assert set(found.right) <= {0, 1} and set(found.routed) <= {*NAMES, "base"}
    if method == "oracle":
        assert list(found.routed) == list(ROWS.adapter)


def test_what_cells_kept_comes_back_with_seeds_costs_and_the_queries_without_an_adapter(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    answers = [["a", "0", "maths", "mlp", 1, "mlp~twin", 0], ["b", "1", "chat", "base", 0, "mlp", 1]]
    part = {"part": "all", "seconds": 2.0, "peak_mib": 7, "variants": 2, "answers": answers}
    for seed in "01":
        runner.keep(tmp_path, ("unseen", "average", seed), [part])
    runner.keep(tmp_path, ("forgotten", "average", "0"), [part])
    found = tables.read()
    assert found.answers.keys() == {"unseen", tables.NO_EXPERT} == found.scores.keys()
    assert list(found.answers["unseen"].found) == [1, 1] and list(found.answers["unseen"].seed) == [0, 1]
    assert list(found.answers[tables.NO_EXPERT].found) == [0, 0]
    assert found.costs_of(tables.NO_EXPERT, "average").seconds.sum() == 4


def test_without_a_cell_there_is_no_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match="nothing in"):
        tables.read()


def test_a_mix_for_every_query_answers_as_one_variant_for_every_query_does(tiny_base, tiny_library, tmp_path):
    base, adapters = load_base(str(tiny_base), "cpu", "float32"), load_library([str(tiny_library)])
    file = tmp_path / "queries.csv"
    ROWS.to_csv(file, index=False)
    queries = [query for n in range(3) for query in read_queries(_renumbered(file, n))]
    told = []
    for kind in (PerQuery, ProtoRoute):
        method = kind("proto_route")
        method.settings = Settings(
            dataset_filepaths=(file,), output_folder=tmp_path / "out", n_variants=len(queries), max_gen_len=5,
            temperature=3.0,
        )  # fmt: skip
        method.attach(base, adapters)
        told.append(method.answer(queries).answers)
    assert [answer.text for answer in told[0]] == [answer.text for answer in told[1]]


def _renumbered(file, n):
    rows = pd.read_csv(file, dtype=str, keep_default_na=False)
    rows["input"] = rows["input"] + " again" * n
    rows["id"] = [f"{n}.{k}" for k in range(len(rows))]
    path = file.with_name(f"{n}.csv")
    rows.to_csv(path, index=False)
    return path


def answered(rights):
    """Answers of methods to one query after the other; `rights` is {(task, method): [0 or 1, ...]}."""
    return pd.DataFrame(
        [
            {"task": task, "method": method, "id": n, "right": right}
            for (task, method), column in rights.items()
            for n, right in enumerate(column)
        ]
    )


def test_scores_are_means_over_tasks_and_differences_are_paired():
    scores = tables.Scores(
        answered({("a", "x"): [1, 0, 0, 0], ("b", "x"): [1, 1], ("a", "y"): [1, 0, 0, 0], ("b", "y"): [1, 1]})
    )
    assert scores.tasks["x"].mean() == pytest.approx((0.25 + 1) / 2)
    value, low, high = scores.value(lambda s: s["x"])
    assert value == 0.625 and low < 0.625 < high <= 1
    assert scores.value(lambda s: s["x"] - s["y"]) == (0, 0, 0)  # the same answers, the same draws


def test_the_interval_has_the_width_that_statistics_says():
    rng = np.random.default_rng(0)
    column = list((rng.random(400) < 0.3).astype(int))
    value, low, high = tables.Scores(answered({("a", "x"): column})).value(lambda s: s["x"])
    width = 2 * 1.96 * np.sqrt(value * (1 - value) / 400)
    assert high - low == pytest.approx(width, rel=0.15)


def test_seeds_count_as_one_query_each():
    both = pd.concat([answered({("a", "x"): [1, 0]}), answered({("a", "x"): [1, 1]})])
    assert tables.Scores(both).tasks.loc["a", "x"] == 0.75


def test_ours_is_compared_with_the_better_single_expert_of_each_task():
    rights = {("a", "x"): [1, 1, 0, 0], ("a", "y"): [1, 0, 0, 0], ("b", "x"): [0, 0], ("b", "y"): [1, 0]}
    singles = answered(rights).rename(columns={"method": "part"})  # the best: 0.5 and 0.5
    for ours, met, points in (([1, 1, 1, 0], True, 12.5), ([1, 1, 0, 0], False, 0.0)):
        scores = tables.Scores(answered({("a", "proto_route"): ours, ("b", "proto_route"): [1, 0]}))
        results = tables.Results({"composite_singles": singles}, {"composite": scores}, pd.DataFrame())
        ((setting, _, measured, found),) = tables._composite(results)
        assert (setting, found) == ("composite", met) and measured.startswith(f"{points:+.1f} (")


def test_a_skewed_mix_is_compared_task_by_task():
    held_in = tables.Scores(answered({("a", "proto_route"): [1, 0, 1, 0], ("b", "proto_route"): [1, 1]}))
    skewed = answered({("a", "proto_route"): [1, 0, 0, 0], ("b", "proto_route"): [1, 1]})
    # Of a part only the queries of its own task count.
    others = skewed.assign(part="elsewhere", right=0)
    skewed = pd.concat([skewed.assign(part=skewed.task), others])
    ((_, _, measured, met),) = tables._skewed(
        tables.Results({"skewed": skewed}, {"held_in": held_in}, others)
    )
    assert (measured, met) == ("-25.0 to +0.0 points; 1 of 2 tasks outside", False)


def test_tables_are_put_between_their_marks(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- t -->\nold\n<!-- /t -->\nafter\n")
    markdown.insert(file, "t", ["new", "lines"])
    assert file.read_text() == "before\n<!-- t -->\nnew\nlines\n<!-- /t -->\nafter\n"
    with pytest.raises(ValueError, match="expected the lines"):
        markdown.insert(file, "u", [])
