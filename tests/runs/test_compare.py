"""What changed between two runs: counted here from their files, or written into runs made by hand."""

import json
from collections import Counter

import numpy as np
import pytest

from helpers import NAMES, edit_json, read_by_id, spoil, write_csv, write_run
from router.cli import main as cli
from router.runs.explain import called


def main(words):
    return cli(["compare", *words])


def compared(capsys, *argv):
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def pair(tmp_path, weights_a, weights_b=None, answers=None):
    """Two runs made by hand on one query file; answers are those of the one and of the other."""
    out = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    for n, weights in enumerate((weights_a, weights_b or weights_a)):
        write_run(out[n], weights)
        if answers:
            rows = [(f"q{k}", answer) for k, answer in enumerate(answers[n])]
            write_csv(out[n] / "run.csv", ("id", "prediction"), rows)
    return out


@pytest.mark.parametrize(("other", "after"), [("base", "the base model"), ("average", "no single one")])
def test_counts_are_those_of_the_files(capsys, runs, other, after):
    one, two = runs("proto_route"), runs(other)
    moves, changes = Counter(), []
    for stem in ("queries", "more"):
        weights, answers = read_by_id(one / f"{stem}.routing.csv"), read_by_id(two / f"{stem}.csv")
        for own, row in read_by_id(one / f"{stem}.csv").items():
            if row["prediction"] != (answer := answers[own]["prediction"]):
                changes.append({"id": f"{stem}:{own}", "a": row["prediction"], "b": answer, "label": None})
            before = called(max((*NAMES, "base"), key=lambda name: float(weights[own][name])))
            moves[before, after] += before != after
    found = compared(capsys, one, two)
    assert {(m["from"], m["to"]): m["queries"] for m in found["moves"]} == dict(+moves)
    assert found["moved"] == moves.total() > 0 and found["queries"] == 4
    assert found["changes"] == changes != [] and found["score"] is None
    assert found["settings"] == [{"setting": "method", "a": "proto_route", "b": other}]


def test_settings_that_differ(capsys, tmp_path):
    one, two = pair(tmp_path, [[1, 0, 0, 0], [0, 0, 0, 1]])
    for name in ("run.csv", "run.routing.csv"):  # in whatever order
        header, *lines = (two / name).read_text().splitlines()
        (two / name).write_text("\n".join([header, *reversed(lines)]) + "\n")
    found = compared(capsys, one, two)
    assert (found["queries"], found["moved"], found["moves"], found["changes"]) == (2, 0, [], [])
    assert [row["setting"] for row in found["settings"]] == ["flags.dataset_filepaths"]
    flags = json.loads((one / "run.json").read_text())["flags"]
    flags |= {"temperature": 1, "output_folder": "x", "top_k": 2, "new": [{"b": 3}]}
    adapters = {name: {"sha256": "new"} for name in ("one", "four")} | {"three": {"sha256": "three"}}
    edit_json(two / "run.json", flags=flags, adapters=adapters)
    spoil(two / "run.routing.csv", "two", "four")
    assert {row["setting"]: (row["a"], row["b"]) for row in compared(capsys, one, two)["settings"]} == {
        "flags.temperature": (0.5, 1), "flags.top_k": (None, 2), "flags.new": (None, [{"b": 3}]),
        "adapters": (["one one", "two two", "three three"], ["one new", "four new", "three three"]),
    }  # fmt: skip
    assert main([str(one), str(two)]) == 0


def test_moves_and_the_first_predictions(capsys, tmp_path):
    long = "the same words again and again until here, "
    one, two = pair(
        tmp_path,
        [[0.9, 0.1, 0, 0]] * 4 + [[0, 0, 1, 0]] * 3,
        [[0.6, 0.4, 0, 0]] + [[0, 0.9, 0, 0.1]] * 3 + [[0, 0, 0.4, 0.6]] * 2 + [[0, 0, 1, 0]],
        (["a", f"{long}left\nnext", *"cdefg"], ["a", f"{long}right [b]\x1b[0m", *"CDEfg"]),
    )
    found = compared(capsys, one, two)
    assert found["moved"] == 5 and found["moves"] == [
        {"from": "one", "to": "two", "queries": 3, "ids": ["q1", "q2", "q3"]},
        {"from": "three", "to": "the base model", "queries": 2, "ids": ["q4", "q5"]},
    ]
    assert [row["id"] for row in found["changes"]] == ["q1", "q2", "q3", "q4"]
    assert main([str(one), str(two), "--show", "2"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and max(map(len, shown.splitlines())) <= 100
    (line,) = (line for line in shown.splitlines() if line.strip().startswith("q1 "))
    assert r"until here, left\nnext" in line and r"until here, right [b]\x1b[0m" in line
    assert " C " in shown and " D " not in shown


def test_the_score_and_the_interval_of_the_paired_difference(capsys, tmp_path):
    rng = np.random.default_rng(7)
    right_a = rng.random(150) < 0.5
    right_b = np.where(rng.random(150) < 0.2, ~right_a, right_a) | (rng.random(150) < 0.1)
    answers = [[" yes \n" if each else "no" for each in right] for right in (right_a, right_b)]
    one, two = pair(tmp_path, [[1, 0, 0, 0]] * 150, answers=answers)
    labels = write_csv(tmp_path / "run.csv", ("id", "target"), [(f"q{n}", "yes") for n in range(150)])
    found = compared(capsys, one, two, "--labels", labels)["score"]
    (_, mean), steps = found["files"], right_b.astype(float) - right_a
    assert (mean["queries"], mean["a"], mean["b"]) == (150, right_a.mean(), right_b.mean())
    assert found["difference"] == pytest.approx(steps.mean())
    drawn = steps[rng.integers(150, size=(20000, 150))].mean(1)
    assert np.allclose((found["low"], found["high"]), np.quantile(drawn, (0.025, 0.975)), atol=0.008)
    (tmp_path / "few").mkdir()
    few = write_csv(tmp_path / "few" / "run.csv", ("id", "target"), [("q0", "yes")])
    assert compared(capsys, one, two, "--labels", few)["score"]["low"] is None
    alike = compared(capsys, one, one, "--labels", labels)["score"]
    assert alike["low"] is alike["high"] is None and alike["difference"] == 0


def test_scores_are_means_over_files_with_a_folder_of_labels(capsys, runs, tmp_path):
    one, two = runs("proto_route"), runs("base")
    expected = {"a": [], "b": [], "routed a": [], "routed b": []}
    for stem in ("queries", "more"):
        answers, others = (read_by_id(out / f"{stem}.csv") for out in (one, two))
        weights = read_by_id(one / f"{stem}.routing.csv")
        right = dict(zip(answers, ("attention", "mlp+base", "everything"), strict=False))
        rows = [(own, row["prediction"].strip(), right[own]) for own, row in answers.items()]
        write_csv(tmp_path / f"{stem}.csv", ("id", "target", "adapter"), rows)
        tops = {o: max((*NAMES, "base"), key=lambda name: float(w[name])) for o, w in weights.items()}
        expected["a"].append(1)
        expected["b"].append(np.mean([others[own]["prediction"].strip() == said for own, said, _ in rows]))
        expected["routed a"].append(np.mean([tops[own] in right[own].split("+") for own in right]))
        expected["routed b"].append(np.mean(["base" in right[own].split("+") for own in right]))
    write_csv(tmp_path / "others.csv", ("id", "target"), [("x", "y")])
    *files, mean = compared(capsys, one, two, "--labels", tmp_path)["score"]["files"]
    for key, values in expected.items():
        assert [part[key] for part in files] == pytest.approx(values)
        assert mean[key] == pytest.approx(np.mean(values))
    static = compared(capsys, runs("average"), one, "--labels", tmp_path)["score"]["files"][-1]
    assert static["routed a"] is None and static["routed b"] == pytest.approx(np.mean(expected["routed a"]))


REFUSED = {
    "other ids": (lambda out: [spoil(out / name, "q1,", "q8,") for name in ("run.csv", "run.routing.csv")],
                  "'run:q1'"),
    "other texts": (lambda out: spoil(out.with_suffix(".csv"), "Question q1?", "Another?"), "run:q1"),
    "no run": (lambda out: (out / "run.json").unlink(), "run.json"),
    "no labels": (lambda out: None, "--labels none.csv: "),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_person_can_mend_is_one_line_and_exit_code_2(capsys, tmp_path, kind):
    one, two = pair(tmp_path, [[1, 0, 0, 0]] * 2)
    REFUSED[kind][0](two)
    assert main([str(one), str(two), *(["--labels", "none.csv"] if kind == "no labels" else [])]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert REFUSED[kind][1] in captured.err


def test_labels_may_be_few_but_not_two_of_one_query(capsys, tmp_path):
    one, two = pair(tmp_path, [[1, 0, 0, 0]] * 3, answers=("abc", "abd"))
    labels = [tmp_path / name / "run.csv" for name in ("first", "second")]
    for path, rows in zip(labels, ([("q0", "a"), ("q2", "c")], [("q0", "b")]), strict=True):
        path.parent.mkdir()
        write_csv(path, ("id", "target"), rows)
    found = compared(capsys, one, two, "--labels", labels[0])
    assert found["score"]["files"][-1]["queries"] == 2 and found["score"]["difference"] == -0.5
    assert found["changes"] == [{"id": "q2", "a": "c", "b": "d", "label": "c"}]
    lines = tmp_path / "run.jsonl"
    lines.write_text('{"id": "q0", "target": 0}\n{"id": "q1", "target": null}\n')
    write_csv(two / "run.csv", ("id", "prediction"), [("q0", "0"), ("q1", "b"), ("q2", "d")])
    found = compared(capsys, one, two, "--labels", lines)
    assert found["score"]["files"][-1]["queries"] == 1 and found["score"]["difference"] == 1.0
    lines.write_text('{"id": "q0", "target": "a", "adapter": ["mlp"]}\n')
    assert main([str(one), str(two), "--labels", str(lines)]) == 2
    assert "run.jsonl, line 1, column adapter: " in capsys.readouterr().err
    assert main([str(one), str(two), "--labels", *(str(path.parent) for path in labels)]) == 2
    assert "second/run.csv, line 2: " in capsys.readouterr().err
