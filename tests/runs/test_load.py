"""Finished runs, real ones on the tiny model and ones written by hand, are read as they were written."""

import json
import os

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from helpers import NAMES, QUERIES, ROWS, edit_json, read_by_id, spoil, weights_in, write_queries, write_run
from router.runs.compare import compare
from router.runs.load import load
from router.system.errors import InputError

EVIDENCE, ROUTING = "run.evidence.safetensors", "run.routing.csv"


def texts(run):
    return [query and query.input for query in run.queries]


def test_a_run_is_read_as_it_was_written(runs):
    out = runs("proto_route")
    run = load(out)
    assert run.record.plain() == json.loads((out / "run.json").read_text())
    assert run.stems == ["queries", "more"] and run.names == [*NAMES, "base"]
    for number, stem in enumerate(run.stems):
        rows = np.flatnonzero(run.file == number)
        answers, table = read_by_id(out / f"{stem}.csv"), read_by_id(out / f"{stem}.routing.csv")
        assert [run.ids[n] for n in rows] == list(answers) == list(table)
        assert [run.predictions[n] for n in rows] == [row["prediction"] for row in answers.values()]
        assert run.labels[rows].tolist() == [int(row["variant"]) for row in table.values()]
        assert run.weights[rows].tolist() == [list(weights_in(row).values()) for row in table.values()]
        arrays = load_file(out / f"{stem}.evidence.safetensors")
        assert np.array_equal(run.evidence.scores[rows], arrays["scores"])
    assert texts(run) == [*(row[1] for row in QUERIES), "1 + 1 ="]
    assert run.keys == [*(f"queries:{row[0]}" for row in QUERIES), "more:g1"]


def test_what_is_not_there_is_none(runs, tmp_path):
    static = load(runs("average"))
    assert static.evidence is None and not static.routes
    out = write_run(tmp_path / "run", [[1.0005, 0, 0, 0]] * 2)  # as a run takes it of a method
    write_queries(tmp_path / "run.csv", [("q1", "Another?", "generation", "")])
    assert texts(load(out)) == [None, "Another?"]
    (tmp_path / "run.csv").unlink()
    (out / "run.routing.csv").unlink()
    edit_json(out / "run.json", variants=None, adapters=None)  # as of a method of the starter kit
    run = load(out)
    assert run.queries == [None, None] and run.names == [] and run.weights.shape == (2, 0)


def evidence_of(names=None, **arrays):
    def spoil(out):
        path = out / EVIDENCE
        with safe_open(path, "np") as file:
            known = names or file.metadata()["names"]
        kept = {key: of for key, of in (load_file(path) | arrays).items() if of is not None}
        save_file(kept, path, {"names": known})

    return spoil


def other_evidence(out, rows, names=("one", "two", "three")):
    other = write_run(out.parent / "b", [[1, 0, 0, 0]] * rows, {}, names=names)
    (other / "b.evidence.safetensors").rename(out / EVIDENCE)


# How a run's files are damaged, and which of them is then named.
BROKEN = {
    "no record": (lambda out: (out / "run.json").unlink(), "run.json"),
    "half a record": (lambda out: (out / "run.json").write_text('{"method"'), "run.json"),
    "another record": (lambda out: (out / "run.json").write_text('{"flags": 1}'), "method: "),
    "a deep record": (lambda out: (out / "run.json").write_text("[" * 100_000), "run.json"),
    **{
        name: (lambda out, part=part: edit_json(out / "run.json", **part), named)
        for name, part, named in (
            ("no files", {"flags": {"dataset_filepaths": []}}, "flags.dataset_filepaths"),
            ("one file twice", {"flags": {"dataset_filepaths": ["a", "a"]}}, "flags.dataset_filepaths"),
            ("a long name", {"flags": {"dataset_filepaths": ["x" * 999]}}, "xxx"),
            ("no name", {"flags": {"dataset_filepaths": ["a\0b"]}}, r"a\x00b"),
            ("endless", {"seconds": {"load": float("inf")}}, "Infinity"),
            ("a variant of nothing", {"variants": [{"queries": 1, "weights": {}}] * 2}, "run.json"),
            ("another format", {"format": 10}, "of format 10"),
            ("no adapters", {"adapters": None}, "adapters"),
            ("no hash", {"adapters": {"one": {}}}, "adapters.one.sha256: "),
            ("an odd dtype", {"base": {"name": "x", "sha256": "0", "dtype": "int4"}}, "base.dtype"),
            ("another file", {"files": {"run.csv": "0" * 64}}, "run.csv"),
            ("a file that is gone", {"files": {"gone.csv": "0" * 64}}, "gone.csv"),
        )
    },
    **{
        f"{old} as {new}": (lambda out, old=old, new=new: spoil(out / ROUTING, old, new), ROUTING)
        for old, new in (
            ("q1,1,0.7", "q1,1,1e999"), ("q1,1,", "q1,inf,"), ("q1,1,", f"q1,{9**30},"), ("0.29", "much"),
            ("q1,", "q7,"), ("q1,1,", "q1,9,"),
        )
    },
    "an id twice": (
        lambda out: [spoil(out / name, "q1", "q0") for name in ("run.csv", "run.routing.csv")], "run.csv",
    ),
    "an empty table": (lambda out: (out / "run.csv").write_text("id,prediction\n"), "run.csv"),
    "no answers": (lambda out: (out / "run.csv").unlink(), "run.csv"),
    "no weights": (lambda out: (out / "run.routing.csv").unlink(), "run.routing.csv"),
    **{
        f"evidence {name}": (harm, EVIDENCE)
        for name, harm in {
            "of no format": lambda out: (out / EVIDENCE).write_bytes(b"no"),
            "without a threshold": evidence_of(base_score=None),
            "of another shape": evidence_of(votes=np.zeros((2, 3), np.float32)),
            "of whole numbers": evidence_of(base_score=np.zeros(2, int)),
            "without scores": evidence_of(scores=np.array([[1, np.nan, 0], [np.nan] * 3], np.float32)),
            "without an end": evidence_of(votes=np.full((2, 12), np.inf, np.float32)),
            "without names": evidence_of(names="7"),
            "of other adapters": lambda out: other_evidence(out, 2, "abc"),
            "of other queries": lambda out: other_evidence(out, 3),
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_belong_together_is_refused(tmp_path, kind):
    out = write_run(tmp_path / "run", [[0.7, 0.29, 0, 0.01]] * 2, {})
    assert load(out)
    BROKEN[kind][0](out)
    with pytest.raises(InputError) as caught:
        load(out)
    assert BROKEN[kind][1] in str(caught.value) and "\n" not in str(caught.value)


def test_queries_that_cannot_be_looked_up_are_not_shown(tmp_path):
    out = write_run(tmp_path / "run", [[1, 0, 0, 0]])
    flags = json.loads((out / "run.json").read_text())["flags"]
    edit_json(out / "run.json", flags=flags | {"dataset_filepaths": [f"{'x' * 300}/run.csv"]})
    assert load(out).queries == [None]


def test_queries_that_changed_since_are_not_shown(command, tmp_path):
    queries = tmp_path / "queries.csv"
    _, out = command("proto_route")
    assert texts(load(out)) == [row[1] for row in ROWS]
    write_queries(queries, [(own, f"{text}?", *rest) for own, text, *rest in ROWS])
    assert load(out).queries == [None] * len(ROWS)
    _, edited = command("proto_route", out="edited")
    with pytest.raises(InputError, match="other in"):
        compare(out, edited)
    queries.unlink()
    os.mkfifo(queries)  # which would give nothing, for ever
    assert load(out).queries == [None] * len(ROWS)
    (out / "queries.evidence.safetensors").unlink()  # of which the record tells
    with pytest.raises(InputError, match=r"queries\.evidence"):
        load(out)


@pytest.mark.parametrize(
    ("flag", "value"), [("max_gen_len", None), ("max_seq_len", "ten"), ("scoring", "best"), ("adapters", [7])]
)
def test_a_flag_that_is_missing_or_unknown_is_named(runs, flag, value):
    run = load(runs("proto_route"))
    run.record.flags[flag] = value
    with pytest.raises(InputError, match=rf"run\.json.*\({flag}"):
        _ = run.settings
