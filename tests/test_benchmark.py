"""The benchmark's libraries, runs and statistics, on the tiny model and on numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest

from merge.factors import dense
from router.adapters import load_library
from router.base import load_base
from scripts.benchmark import cells, libraries, settings, tables
from scripts.benchmark.per_query import PerQuery

NAMES = ["attention", "everything", "mlp"]


@pytest.fixture()
def adapters(tiny_library, tmp_path, monkeypatch):
    monkeypatch.setattr(libraries, "FOLDER", tmp_path / "made")
    return load_library([str(tiny_library)])


def updates(adapter):
    return {module: dense(update).double().numpy() for module, update in adapter.read_all()}


def cosine(one, other):
    both = [(a.ravel() @ other[module].ravel()) for module, a in one.items() if module in other]
    norms = [np.sqrt(sum(np.square(a).sum() for a in x.values())) for x in (one, other)]
    return sum(both) / np.prod(norms)


def test_rescaled_copies_are_the_adapters_times_a_number(adapters):
    found = {adapter.name: adapter for adapter in libraries.with_rescaled(adapters)}
    assert len(found) == 9
    for name in NAMES:
        own = updates(found[name])
        for mark, scale in (("x4", 4), ("x0.25", 0.25)):
            copy = updates(found[f"{name}~{mark}"])
            for module, update in own.items():
                apart = np.linalg.norm(copy[module] - scale * update)
                assert apart < 0.01 * np.linalg.norm(scale * update)  # bfloat16


def test_random_adapters_have_the_shapes_and_norms_of_real_ones_but_not_their_directions(
    adapters, monkeypatch
):
    monkeypatch.setattr(libraries, "RANDOM", 5)
    found = libraries.with_random(adapters)
    assert [adapter.name for adapter in found] == NAMES + [f"random{n:02}" for n in range(5)]
    for n, drawn in enumerate(found[3:]):
        source = adapters[n % 3]
        assert drawn.folder.shapes.keys() >= source.folder.shapes.keys()
        assert abs(cosine(updates(source), updates(drawn))) < 0.2


def test_grown_copies_stay_close_and_are_made_once(adapters, monkeypatch):
    monkeypatch.setattr(libraries, "GROWN", 8)
    found = libraries.grown(adapters)
    assert len(found) == 8 and len({adapter.sha256 for adapter in found}) == 8
    for copy in found[3:]:
        source = next(adapter for adapter in adapters if adapter.name == libraries.skill_of(copy.name))
        assert 0.95 < cosine(updates(source), updates(copy)) < 0.9999
    again = libraries.grown(adapters)
    assert [adapter.sha256 for adapter in again] == [adapter.sha256 for adapter in found]


def test_twins_are_the_same_and_one_can_be_left_out(adapters):
    twins = libraries.with_duplicates(adapters)
    assert [libraries.skill_of(adapter.name) for adapter in twins] == NAMES * 2
    assert cosine(updates(twins[0]), updates(twins[3])) > 0.9999
    assert [adapter.name for adapter in libraries.without("mlp")(adapters)] == NAMES[:2]
    assert [adapter.name for adapter in libraries.only("mlp")(adapters)] == ["mlp"]


def test_left_out_tasks_miss_their_adapter_and_skewed_mixes_are_skewed():
    class Named:
        def __init__(self, name):
            self.name = name

    tasks = sorted(set(settings.labelled("eval")["task"]))
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
def tiny_setting(tmp_path, monkeypatch, tiny_base, tiny_library):
    base, adapters = load_base(str(tiny_base), "cpu", "float32"), load_library([str(tiny_library)])
    setting = settings.Setting("held_in", ("average",), lambda: [settings.Part("all", ROWS)])
    monkeypatch.setattr(cells, "SETTINGS", {"held_in": setting})
    monkeypatch.setattr(cells, "CELLS", tmp_path / "cells")
    monkeypatch.setattr(cells, "load_base", lambda spec: base)
    monkeypatch.setattr(cells, "load_library", lambda specs: adapters)
    return setting


@pytest.mark.parametrize("method", ["average", "per_query", "oracle"])
def test_answers_are_kept_and_not_made_twice(tiny_setting, monkeypatch, method):
    cells.answer("held_in", method, 0)
    folder = cells.folder_of("held_in", method, 0)
    found = pd.read_csv(folder / "all.csv", dtype={"id": str})
    assert list(zip(found.task, found.id, found.adapter, strict=True)) == [
        (row.task, row.id, row.adapter) for row in ROWS.itertuples()
    ]
    assert set(found.right) <= {0, 1} and set(found.routed) <= {*NAMES, "base"}
    if method == "oracle":
        assert list(found.routed) == list(ROWS.adapter)
    assert sorted(path.name for path in folder.iterdir()) == ["all.csv", "all.json"]
    monkeypatch.setattr(cells, "load_base", lambda spec: pytest.fail("answered twice"))
    cells.answer("held_in", method, 0)


def test_a_mix_for_every_query_answers_as_one_variant_for_every_query_does(tiny_base, tiny_library, tmp_path):
    base, adapters = load_base(str(tiny_base), "cpu", "float32"), load_library([str(tiny_library)])
    file = tmp_path / "queries.csv"
    ROWS.to_csv(file, index=False)
    from router.methods.proto_route import ProtoRoute
    from router.settings import Settings
    from router.submission import read_queries

    queries = [query for n in range(3) for query in read_queries(_renumbered(file, n))]
    told = []
    for kind in (PerQuery, ProtoRoute):
        method = kind("proto_route")
        method.settings = Settings(
            dataset_filepaths=(file,), output_folder=tmp_path / "out", n_variants=len(queries), max_gen_len=5,
            temperature=3.0,
        )  # fmt: skip
        method.attach(base, adapters)
        told.append(method.answer(queries))
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


def test_tables_are_put_between_their_marks(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- t -->\nold\n<!-- /t -->\nafter\n")
    tables.insert(file, "t", ["new", "lines"])
    assert file.read_text() == "before\n<!-- t -->\nnew\nlines\n<!-- /t -->\nafter\n"
    with pytest.raises(ValueError, match="expected the lines"):
        tables.insert(file, "u", [])
