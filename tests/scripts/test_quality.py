"""The benchmark's settings, cells and statistics, on the tiny model and on numbers worked out by hand."""

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import method_of
from router.context import Context
from router.library.adapters import load_library
from router.methods.proto_route import ProtoRoute
from router.model.answer import encode
from router.model.base import load_base
from router.settings import Settings
from router.submission import GENERATION, Query, read_queries
from scripts.bench import development, markdown, runner, score
from scripts.bench.quality import cells, settings, tables
from scripts.bench.quality.likelihood import log_likelihoods, of_references
from scripts.bench.quality.per_query import PerQuery

NAMES = ["attention", "everything", "mlp"]


def test_left_out_tasks_miss_their_adapter_and_skewed_mixes_are_skewed():
    class Named:
        def __init__(self, name):
            self.name = name

    (committed,) = (one for one in development.libraries() if one.name == development.COMMITTED)
    tasks = sorted(set(score.labelled("eval")["task"]))
    library = [Named(task) for task in tasks]
    for part in settings.SETTINGS["left_out"].parts(committed.rows):
        assert part.name in tasks and set(part.rows["task"]) == {part.name}
        assert len(part.rows) == settings.FEWER and set(part.rows["split"]) == {"own"}
        assert [a.name for a in part.library(library)] == [task for task in tasks if task != part.name]
    for part in settings.SETTINGS["skewed"].parts(committed.rows):
        assert (part.rows["task"] == part.name).mean() == pytest.approx(0.9, abs=0.02)
    singles = settings.SETTINGS["composite_singles"].parts(committed.rows)
    assert all(part.name in row.split("+") for part in singles for row in part.rows["adapter"])


ROWS = pd.DataFrame(
    [("own", "a", "0", "one plus one", "2", "", "generation", "mlp", "exact"),
     ("own", "a", "1", "another question, longer", "a | b|c", "", "generation", "mlp", "contains"),
     ("unseen", "b", "0", "pick", "1", "['no', 'yes']", "multiple_choice", "attention", "mc"),
     ("foreign", "chat", "0", "hello", "", "", "generation", "base", "none")],
    columns=["split", "task", "id", "input", "target", "answer_choices", "eval_type", "adapter", "metric"],
)  # fmt: skip


@pytest.fixture()
def tiny_setting(monkeypatch, tiny_base, tiny_library):
    labelled = development.Labelled("tiny", tiny_library, str(tiny_base), ROWS)
    halves = settings.Setting(
        "queries", (), lambda rows: [settings.Part("first", rows[:1]), settings.Part("rest", rows[1:])]
    )
    monkeypatch.setattr(cells, "SETTINGS", {"queries": halves})
    monkeypatch.setattr(cells, "libraries", lambda: iter([labelled]))


@pytest.mark.parametrize("method", ["average", "per_query", "oracle"])
def test_a_cell_has_an_answer_for_each_query_and_what_each_part_cost(tiny_setting, method):
    parts = cells.answer("tiny", "queries", method, "0")
    assert [part["part"] for part in parts] == ["first", "rest"]
    assert all(part["variants"] >= 1 and part["seconds"] > 0 and part["peak_mib"] > 0 for part in parts)
    found = pd.DataFrame([row for part in parts for row in part["answers"]], columns=cells.COLUMNS)
    assert list(zip(found.split, found.task, found.id, found.adapter, strict=True)) == [
        (row.split, row.task, row.id, row.adapter) for row in ROWS.itertuples()
    ]
    assert set(found.routed) <= {*NAMES, "base"} and found.weight.between(0, 1).all()
    assert list(found.score.isna()) == list(found.nats.isna()) == [False, False, False, True]
    assert (found.nats[:3] < 0).all()
    if method == "oracle":
        assert list(found.routed) == list(ROWS.adapter)


@pytest.mark.parametrize("method", ["average", "proto_route", "arrow"])
def test_a_graded_cell_has_the_same_likelihoods_and_no_scores(tiny_setting, method):
    whole, graded = (
        pd.DataFrame(
            [row for part in cells.answer("tiny", "queries", method, seed) for row in part["answers"]],
            columns=cells.COLUMNS,
        )
        for seed in ("0", cells.GRADED)
    )
    assert graded.score.isna().all() and not whole.score[:3].isna().any()
    np.testing.assert_allclose(graded.nats, whole.nats, atol=1e-5)
    pd.testing.assert_frame_equal(
        graded.drop(columns=["score", "nats"]), whole.drop(columns=["score", "nats"])
    )


def test_a_graded_cell_counts_where_there_is_no_whole_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)

    def cell(score, nats):
        answer = ["own", "a", "0", "mlp", score, nats, "mlp", 0.9, 0]
        return [{"part": "all", "seconds": 2.0, "peak_mib": 7, "variants": 2, "answers": [answer]}]

    runner.keep(tmp_path, ("tiny", "queries", "base", "0"), cell(1.0, -0.5))
    runner.keep(tmp_path, ("tiny", "queries", "base", cells.GRADED), cell(np.nan, -9.0))
    runner.keep(tmp_path, ("tiny", "queries", "average", cells.GRADED), cell(np.nan, -3.0))
    lines = tables.methods_tables(tables.read())
    lines = {line.split("|")[1].strip(): line for line in lines if line.startswith("| `")}
    assert lines["`base`"] == "| `base` | **1.000** ±0.000, -0.50 | 2 | 7 |"
    assert lines["`average`"] == "| `average` | -3.00 | | |"


@pytest.mark.parametrize("scored", [(), ("base",), ("base", "proto_route")])
def test_all_tables_are_made_of_what_is_there(tmp_path, monkeypatch, scored):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    for method in ("base", "proto_route", "oracle", "average", "single"):
        for setting in ("queries", "left_out", "left_out_singles"):
            answer = ["own", "a", "0", "mlp", 0.5 if method in scored else np.nan, -0.5, "mlp", 0.9, 0]
            part = {"part": "all", "seconds": 2.0, "peak_mib": 7, "variants": 2, "answers": [answer]}
            seed = "0" if method in scored else cells.GRADED
            runner.keep(tmp_path, ("tiny", setting, method, seed), [part])
    found = tables.read()
    assert tables.methods_tables(found) and tables.quality(found).nats.notna().all()
    text = "\n".join(tables.targets_table(found))
    assert "likelihood above every static merge" in text and ("of the oracle" in text) is False
    assert bool(tables.tasks_tables(found)) == bool(scored)


def test_a_likelihood_is_that_of_the_tokens_after_the_prompt_with_or_without_a_blank(tiny_base, monkeypatch):
    base = load_base(str(tiny_base), "cpu", "float32")
    prompts, texts = ["one two three", "a"], ["four five", "b"]
    rows = encode(base.tokenizer, prompts)
    found = log_likelihoods(base.model, base.tokenizer, rows, [*texts, ""][:2])
    for row, text, value in zip(rows, texts, found, strict=True):
        forms = []
        for form in (text, f" {text}"):
            tokens = base.tokenizer(form, add_special_tokens=False)["input_ids"]
            logits = base.model(torch.tensor([[*row, *tokens]])).logits[0].detach().double().log_softmax(-1)
            forms.append(np.mean([float(logits[len(row) - 1 + n, token]) for n, token in enumerate(tokens)]))
        assert value == pytest.approx(max(forms), abs=1e-5)
    for budget in (4096, 1):  # both forms in one batch; alone, one has no token at all
        monkeypatch.setattr("scripts.bench.quality.likelihood.CHOICE_TOKENS", budget)
        assert np.isnan(log_likelihoods(base.model, base.tokenizer, rows[:1], [""])[0])


def test_the_reference_is_graded_under_the_variant_that_answers(tiny_base, tiny_library, tmp_path):
    base, adapters = load_base(str(tiny_base), "cpu", "float32"), load_library([str(tiny_library)])
    queries = [Query("0", "one two", GENERATION), Query("1", "three", GENERATION)]
    told = {}
    for name in ("base", "average"):
        method = method_of(name, base, adapters, output_folder=tmp_path, max_gen_len=2)
        result, rows = method.answer(queries), method.encoded(queries)
        told[name] = of_references(
            method, queries, rows, ["four", "five six"], result.decision, tmp_path / "variants"
        )
        assert method.answer(queries).answers == result.answers  # grading leaves no trace
    plain = log_likelihoods(base.model, base.tokenizer, rows, ["four", "five six"])
    assert told["base"] == pytest.approx(plain) and told["average"] != pytest.approx(plain, abs=1e-4)


def test_what_cells_kept_comes_back_with_seeds_costs_and_a_setting_for_each_split(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    answers = [
        ["own", "a", "0", "mlp", 1.0, -0.5, "mlp~twin", 0.9, 0],
        ["none", "b", "1", "base", 0.0, -2.0, "mlp", 0.6, 1],
    ]
    part = {"part": "all", "seconds": 2.0, "peak_mib": 7, "variants": 2, "answers": answers}
    for seed in "01":
        runner.keep(tmp_path, ("tiny", "queries", "average", seed), [part])
    runner.keep(tmp_path, ("tiny", "forgotten", "average", "0"), [part])
    found = tables.read()
    assert found.answers.keys() == {("tiny", "own"), ("tiny", "none")} and found.libraries == ["tiny"]
    assert list(found.answers["tiny", "own"].found) == [1, 1]
    assert list(found.answers["tiny", "own"].seed) == [0, 1]
    assert list(found.answers["tiny", "none"].found) == [0, 0]
    assert found.scores("tiny", "own", "nats").tasks["average"].tolist() == [-0.5]
    assert found.costs_of("tiny", "queries", "average").seconds.sum() == 4
    table = tables.quality(found)
    assert set(table.setting) == {"own", "none"} and table.queries.tolist() == [1, 1]


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
        settings = Settings(
            dataset_filepaths=(file,), output_folder=tmp_path / "out", n_variants=len(queries), max_gen_len=5,
            temperature=3.0,
        )  # fmt: skip
        method = kind("proto_route", base, adapters, Context(settings))
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
            {"task": task, "method": method, "id": n, "score": score}
            for (task, method), column in rights.items()
            for n, score in enumerate(column)
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


def results(**settings):
    """Results of one library by setting."""
    return tables.Results({("tiny", name): found for name, found in settings.items()}, pd.DataFrame())


def test_ours_is_compared_with_the_better_single_expert_of_each_task():
    rights = {("a", "x"): [1, 1, 0, 0], ("a", "y"): [1, 0, 0, 0], ("b", "x"): [0, 0], ("b", "y"): [1, 0]}
    singles = answered(rights).rename(columns={"method": "part"})  # the best: 0.5 and 0.5
    for ours, met, points in (([1, 1, 1, 0], True, 12.5), ([1, 1, 0, 0], False, 0.0)):
        asked = answered({("a", "proto_route"): ours, ("b", "proto_route"): [1, 0]})
        both = [part.assign(nats=part.score) for part in (asked, singles)]
        found = results(composite=both[0], composite_singles=both[1].assign(method="single"))
        (_, _, measured, score_met), (_, _, graded, nats_met) = tables._composite(found, "tiny")
        assert score_met == nats_met == met and measured.startswith(f"{points:+.1f} (")
        assert graded.startswith(f"{points / 100:+.2f} (")


def test_a_skewed_mix_is_compared_task_by_task():
    own = answered({("a", "proto_route"): [1, 0, 1, 0], ("b", "proto_route"): [1, 1]})
    skewed = answered({("a", "proto_route"): [1, 0, 0, 0], ("b", "proto_route"): [1, 1]})
    # Of a part only the queries of its own task count.
    others = skewed.assign(part="elsewhere", score=0)
    skewed = pd.concat([skewed.assign(part=skewed.task), others])
    ((_, _, measured, met),) = tables._skewed(results(own=own, skewed=skewed), "tiny")
    assert (measured, met) == ("-25.0 to +0.0 points; 1 of 2 tasks outside", False)


def test_a_loss_in_one_kind_of_foreign_query_is_not_hidden_by_a_gain_in_another():
    ours, base = {"chat": [1, 0], "prose": [1, 1]}, {"chat": [1, 1], "prose": [0, 1]}
    found = answered({(kind, "proto_route"): column for kind, column in ours.items()}
                     | {(kind, "base"): column for kind, column in base.items()})  # fmt: skip
    told = list(tables._without_adapter(results(foreign=found.assign(found=1.0, routed="x")), "tiny"))
    assert [met for *_, met in told] == [True, False, True, False, True, False]
    assert told[1][2] == told[3][2] == "-50.0 points (chat)"


def test_what_the_base_model_answers_in_another_batch_is_no_loss_by_adapters():
    found = answered({("chat", "proto_route"): [0, 0, 1, 0], ("chat", "base"): [1, 1, 0, 1]})
    ours = ["base", "x", "base", "base"]
    told = list(
        tables._without_adapter(
            results(foreign=found.assign(found=1.0, routed=[*ours, *["base"] * 4])), "tiny"
        )
    )
    assert [value for _, aim, value, _ in told if "in every kind" in aim] == [
        "-50.0 points (chat)", "-25.0 points (chat)",
    ]  # fmt: skip


@pytest.mark.parametrize(("left", "kept"), [(1.0, False), (0.8, True), (0.5, False)])
def test_a_promise_of_false_alarms_is_broken_by_too_few_and_by_too_many(left, kept):
    found = answered({("chat", "proto_route"): [1, 1], ("chat", "base"): [1, 1]}).assign(
        found=left, routed="x"
    )
    *_, (_, aim, sent, met) = tables._without_adapter(results(foreign=found), "tiny")
    assert "false alarms" in aim and sent == f"{1 - left:.3f}" and met == kept


def test_tables_are_put_between_their_marks(tmp_path):
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- t -->\nold\n<!-- /t -->\nafter\n")
    markdown.insert(file, "t", ["new", "lines"])
    assert file.read_text() == "before\n<!-- t -->\nnew\nlines\n<!-- /t -->\nafter\n"
    with pytest.raises(ValueError, match="expected the lines"):
        markdown.insert(file, "u", [])
