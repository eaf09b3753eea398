"""Finished runs, real ones on the tiny model and ones written by hand, are read as they were written."""

import csv
import json
from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from conftest import WIDTHS, write_tiny_adapter
from safetensors.numpy import load_file, save_file

from router.errors import InputError
from router.evidence import Evidence
from router.finished import load
from router.main import main as answer_queries

HEADER = ("id", "input", "eval_type", "answer_choices")
QUERIES = [
    ("g1", "What is two and two?", "generation", ""),
    ("m1", "Which is a fruit, stone or pear? ", "multiple_choice", "['stone', 'pear']"),
    ("g2", "Bonjour, comment allez-vous ?", "generation", ""),
]
NAMES = ["attention", "everything", "mlp"]
MODULES = [f"model.layers.{n}.{kind}" for n in range(6) for kind in ("self_attn.q_proj", "mlp.up_proj")]
NONE = float("nan")
# Three adapters: responses, scores, confidence and effect (NaN: not tried), scores after trials.
DECIDED = {
    "responses": [0.10, 0.20, 0.05],
    "scores": [2.0, 2.4, -1.0],
    "candidates": [3.0, 2.4, -np.inf, 0.8],
    "effect": [1.5, 0.5, NONE],
    "confidence": [1.0, -0.5, NONE],
    "base_confidence": -2.0,
    "votes": np.zeros(len(MODULES)),
}


def write_csv(path, header, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def read_csv(path):
    with path.open(encoding="utf-8", newline="") as file:
        return {row["id"]: row for row in csv.DictReader(file)}


@pytest.fixture(scope="session")
def runs(tmp_path_factory, tiny_base):
    """Output folders of finished runs on the tiny model, by method; made when first asked for."""
    folder = tmp_path_factory.mktemp("runs")
    write_tiny_adapter(folder / "library" / "attention", 1, 4, tuple(WIDTHS)[:4], alpha=8)
    write_tiny_adapter(folder / "library" / "everything", 2, 2, alpha=2)
    write_tiny_adapter(folder / "library" / "mlp", 3, 6, tuple(WIDTHS)[4:], alpha=9, use_rslora=True)
    queries = [
        write_csv(folder / "queries.csv", HEADER, QUERIES),
        write_csv(folder / "more.csv", HEADER, [("g1", "1 + 1 =", "generation", "")]),
    ]

    def run(method):
        out = folder / method
        if not out.exists():
            argv = ["-m", method, "--dataset_filepaths", *queries, "--adapters", folder / "library",
                    "--base_model", tiny_base, "--output_folder", out, "--max_gen_len", 6]  # fmt: skip
            with redirect_stdout(StringIO()):
                assert answer_queries([str(word) for word in argv]) == 0
        return out

    return run


def write_run(out, weights, evidence=None, inputs=None, names=("one", "two", "three"), **more):
    """A finished run by hand, a query and a variant for each row of weights.

    Args:
        evidence: fields of one query's that differ from DECIDED, the same of all; None writes none.
        more: what else run.json holds.
    """
    out.mkdir(parents=True)
    path, columns, ids = (
        out.parent / f"{out.name}.csv",
        [*names, "base"],
        [f"q{n}" for n in range(len(weights))],
    )
    inputs = inputs or [f"Question {own}?" for own in ids]
    write_csv(path, HEADER, [(own, text, "generation", "") for own, text in zip(ids, inputs, strict=True)])
    record = {
        "method": "by_hand", "versions": {"torch": "1"}, "seconds": {"load": 1.5}, "peak_mib": {"load": 9},
        "flags": {"dataset_filepaths": [str(path)], "output_folder": str(out), "temperature": 0.5},
        "base": {"name": "tiny", "sha256": "0" * 64}, "adapters": {name: {"sha256": name} for name in names},
        "variants": [
            {"folder": f"variants/{n}", "queries": 1, "weights": dict(zip(columns, row, strict=True))}
            for n, row in enumerate(weights)
        ],
    } | more  # fmt: skip
    (out / "run.json").write_text(json.dumps(record))
    write_csv(out / path.name, ("id", "prediction"), [(own, f"answer {own}") for own in ids])
    rows = [(own, n, *row) for n, (own, row) in enumerate(zip(ids, weights, strict=True))]
    write_csv(out / f"{out.name}.routing.csv", ("id", "variant", *columns), rows)
    if evidence is not None:
        fields = {key: np.array([value] * len(ids)) for key, value in (DECIDED | evidence).items()}
        Evidence(list(names), MODULES, **fields).save(out / f"{out.name}.evidence.safetensors")
    return out


def spoil(path, old, new):
    content = path.read_text("utf-8")
    assert old in content
    path.write_text(content.replace(old, new), "utf-8")


def test_a_run_is_read_as_it_was_written(runs):
    out = runs("proto_route")
    run = load(out)
    assert run.record == json.loads((out / "run.json").read_text()) and list(run.files) == ["queries", "more"]
    for stem, file in run.files.items():
        answers, table = read_csv(out / f"{stem}.csv"), read_csv(out / f"{stem}.routing.csv")
        assert dict(zip(file.ids, file.predictions, strict=True)) == {
            own: row["prediction"] for own, row in answers.items()
        }
        assert file.names == [*NAMES, "base"] and file.labels.tolist() == [
            int(r["variant"]) for r in table.values()
        ]
        assert file.weights.tolist() == [[float(row[name]) for name in file.names] for row in table.values()]
        assert file.heaviest == [max(file.names, key=lambda name: float(row[name])) for row in table.values()]
        arrays = load_file(out / f"{stem}.evidence.safetensors")
        assert np.array_equal(file.evidence.scores, arrays["scores"]) and len(arrays["scores"]) == len(
            file.ids
        )
    assert [query.input for query in run.files["queries"].queries] == [row[1] for row in QUERIES]


def test_what_is_not_there_is_none(runs, tmp_path):
    assert load(runs("average")).files["more"].heaviest == [None]
    assert load(runs("average")).files["more"].evidence is None
    out = write_run(tmp_path / "run", [[1, 0, 0, 0]] * 2)
    write_csv(tmp_path / "run.csv", HEADER, [("q1", "Another?", "generation", "")])
    assert [query and query.input for query in load(out).files["run"].queries] == [None, "Another?"]
    (tmp_path / "run.csv").unlink()
    record = json.loads((out / "run.json").read_text())
    del record["variants"], record["adapters"]  # as of a method of the starter kit
    (out / "run.json").write_text(json.dumps(record))
    (out / "run.routing.csv").unlink()
    file = load(out).files["run"]
    assert file.queries == file.heaviest == [None, None] and file.names == [] and file.weights.shape == (2, 0)
    assert file.predictions == ["answer q0", "answer q1"]


def other_evidence(out, rows, names=("one", "two", "three")):
    other = write_run(out.parent / "b", [[1, 0, 0, 0]] * rows, {}, names=names)
    (other / "b.evidence.safetensors").rename(out / "run.evidence.safetensors")


BROKEN = {
    "no record": (lambda out: (out / "run.json").unlink(), "run.json: expected the record of a"),
    "half a record": (lambda out: (out / "run.json").write_text('{"method"'), "record of a finished run, in"),
    "another record": (lambda out: (out / "run.json").write_text('{"flags": 1}'), "method, versions"),
    "no answers": (lambda out: (out / "run.csv").unlink(), "run.csv: expected a CSV file, found none"),
    "no weights": (lambda out: (out / "run.routing.csv").unlink(), "run.routing.csv: expected a CSV file"),
    "a weight": (lambda out: spoil(out / "run.routing.csv", "0.29", "much"), "'much'"),
    "other ids": (lambda out: spoil(out / "run.routing.csv", "q1,", "q7,"), "routing.csv: expected the ids"),
    "a variant": (lambda out: spoil(out / "run.routing.csv", "q1,1,", "q1,9,"), "variants that run.json"),
    "evidence": (lambda out: (out / "run.evidence.safetensors").write_bytes(b"no"), "expected the evidence"),
    "older evidence": (
        lambda out: save_file({"votes": np.zeros(1)}, out / "run.evidence.safetensors"), "the evidence",
    ),
    "other adapters": (lambda out: other_evidence(out, 2, "abc"), "expected the adapters and queries"),
    "other queries": (lambda out: other_evidence(out, 3), "adapters and queries of"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_what_does_not_belong_together_is_refused(tmp_path, kind):
    out = write_run(tmp_path / "run", [[0.7, 0.29, 0, 0.01]] * 2, {})
    assert load(out)
    BROKEN[kind][0](out)
    with pytest.raises(InputError) as caught:
        load(out)
    assert BROKEN[kind][1] in str(caught.value) and "\n" not in str(caught.value)
