"""What changed between two finished runs on the same queries: `proto-route compare before after`.

Labels are read only here, after the fact, to score what both runs wrote; no method imports this.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from router.pipeline.record import Record
from router.queries.submission import adapters_of, read_rows
from router.runs.explain import Rows, called, open_console, section
from router.runs.load import Run, load
from router.system.errors import InputError, exit_code
from router.system.files import is_folder

PARTS = ("flags", "base", "versions")  # of a record that decide a run
DRAWS = 2000
WIDTH = 48  # characters of a prediction or a setting shown


def compare(a: Path, b: Path, labels: Sequence[Path] = ()) -> dict[str, Any]:
    """Compares two runs; returns what `--json` prints.

    Args:
        labels: CSV files with `id,target` and optionally `adapter`, named like the query files, or folders of
            such files.

    Raises:
        InputError: a folder holds no finished run, the queries differ, or there are no labels.
    """
    one, two = load(a), load(b)
    both = _joined(one, two)
    rows = _labels(labels, one.stems) if labels else {}
    for name, column in (("label", "target"), ("adapter", "adapter")):  # None where there is none
        known = [rows.get(key, {}).get(column) for key in both.index]
        both[name] = pd.Series(known, both.index, object)
    changed = both[both["a"] != both["b"]]
    moved = both[both["top a"].map(called) != both["top b"].map(called)]
    groups = moved.groupby([moved["top a"].map(called), moved["top b"].map(called)], sort=False)["id"]
    moves = [
        {"from": source, "to": target, "queries": len(ids), "ids": ids.tolist()}
        for (source, target), ids in groups
    ]
    return {
        "a": str(a),
        "b": str(b),
        "queries": len(both),
        "settings": _settings(one.record, two.record),
        "moved": len(moved),
        "moves": sorted(moves, key=lambda move: -move["queries"]),
        "changes": changed[["id", "a", "b", "label"]].to_dict("records"),
        "score": _score(both) if labels else None,
    }


def _joined(one: Run, two: Run) -> pd.DataFrame:
    """The queries of two runs by `STEM:ID`: the predictions `a` and `b`, and each run's top candidate."""
    if sorted(one.stems) != sorted(two.stems):
        got = " and ".join(f"{', '.join(run.stems)} in {run.folder}" for run in (one, two))
        raise InputError(f"expected two runs on the same query files, got {got}")
    a, b = (
        pd.DataFrame(
            {"answer": run.predictions, "top": run.top, "asked": run.queries}, run.keys, dtype=object
        )
        for run in (one, two)
    )
    if len(alone := a.index.symmetric_difference(b.index)):
        raise InputError(
            f"expected the same ids in both runs, but {len(alone)} are in one alone, such as {alone[0]!r}; "
            "run both on one query file"
        )
    b = b.loc[a.index]
    for key, asked, other in zip(a.index, a["asked"], b["asked"], strict=True):
        if asked and other and asked != other:
            raise InputError(
                f"expected two runs on the same queries, but {key!r} is another in {one.folder} than in "
                f"{two.folder}; run both on one query file"
            )
    return pd.DataFrame({
        "file": [one.stems[number] for number in one.file],
        "id": one.keys if len(one.stems) > 1 else one.ids,
        "a": a["answer"], "b": b["answer"], "top a": a["top"], "top b": b["top"],
    }, a.index)  # fmt: skip


def _settings(a: Record, b: Record) -> Rows:
    """What decides a run, as far as the two records differ."""
    one, two = (
        {"method": record.method}
        | {f"{part}.{name}": value for part in PARTS for name, value in plain.get(part, {}).items()}
        | {"adapters": [f"{name} {of.sha256[:12]}" for name, of in record.adapters.items()]}
        for record, plain in ((a, a.plain()), (b, b.plain()))
    )
    return [
        {"setting": name, "a": one.get(name), "b": two.get(name)}
        for name in one | two
        if one.get(name) != two.get(name) and name != "flags.output_folder"
    ]


def _labels(paths: Sequence[Path], stems: Sequence[str]) -> dict[str, dict[str, str]]:
    """Rows of labels by `STEM:ID`."""
    files = [file for path in paths for file in (sorted(path.glob("*.csv")) if is_folder(path) else [path])]
    if not (of_runs := [file for file in files if file.stem in stems and file.exists()]):
        raise InputError(
            f"--labels {' '.join(map(str, paths))}: expected CSV files named as the query files "
            f"({', '.join(stems)}), or a folder of them; found none"
        )
    rows: dict[str, dict[str, str]] = {}
    for file in of_runs:
        for line, row in read_rows(file, ("id", "target")):
            if rows.setdefault(f"{file.stem}:{row['id']}", row) is not row:
                raise InputError(
                    f"--labels: {file}, line {line}: expected one row for each query, got a second one for "
                    f"{row['id']:.60}"
                )
    return rows


def _score(both: pd.DataFrame) -> dict[str, Any]:
    """Shares of right answers, their means over files, and the interval of the paired difference."""
    known = both[both["label"].notna()]
    if known.empty:
        raise InputError("--labels: expected ids of the runs' queries, found none of them")
    right = pd.DataFrame({"file": known["file"]})
    for side in "ab":
        right[side] = (known[side].str.strip() == known["label"]).astype(float)
    for side in "ab":  # how often the top candidate is a labelled adapter, unless there is none
        tops = known[f"top {side}"]
        named = known["adapter"] if tops.any() else [None] * len(tops)
        pairs = zip(tops, named, strict=True)
        right[f"routed {side}"] = [float(top in adapters_of(of)) if of else np.nan for top, of in pairs]
    groups = right.groupby("file", sort=False)
    means = groups.mean()
    # To draw queries with replacement is to draw how many were lost, equal and gained.
    rng, steps, drawn = np.random.default_rng(0), np.array([-1, 0, 1]), []
    for _, of in groups:
        shares = ((of["b"] - of["a"]).to_numpy()[:, None] == steps).mean(0)
        drawn.append(rng.multinomial(len(of), shares, DRAWS) @ steps / len(of))
    low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975)).tolist()
    means.insert(0, "queries", groups.size())
    means.loc["mean over files"] = means.mean()
    means.loc["mean over files", "queries"] = len(known)
    files = means.astype({"queries": int}).reset_index().astype(object).where(lambda of: of.notna(), None)
    difference = float((means["b"] - means["a"]).iloc[-1])
    return {"files": files.to_dict("records"), "difference": difference, "low": low, "high": high}


def show(found: Mapping[str, Any], console: Console, most: int) -> None:
    """Prints a comparison, with at most `most` of the predictions that differ."""
    section(console, f"A: {found['a']}\nB: {found['b']}")
    settings = [{"setting": row["setting"], **_apart(row["a"], row["b"])} for row in found["settings"]]
    section(console, f"Settings that differ: {len(settings)}", settings)
    total = found["queries"]
    moves = [row | {"ids": _line(", ".join(row["ids"]))} for row in found["moves"]]
    section(console, f"Top candidate: changed for {found['moved']} of {total} queries", moves)
    changes = [row | _apart(row["a"], row["b"]) for row in found["changes"][:most]]
    section(console, f"Predictions: {len(found['changes'])} of {total} differ, {len(changes)} shown", changes)
    if score := found["score"]:
        points = [f"{100 * score[key]:+.1f}" for key in ("difference", "low", "high")]
        how = f"95 % interval {points[1]} to {points[2]} (paired, queries drawn {DRAWS} times)"
        text = f"B - A: {points[0]} points, {how}"
        section(console, "Shares of right answers and of right routes", score["files"], text)


def _line(text: str) -> str:
    return (text if len(text) <= WIDTH else f"{text[:WIDTH]}...").replace("\n", "\\n")


def _apart(a: Any, b: Any) -> dict[str, str]:
    """Two values, each on one line from shortly before they differ; of two lists, what only one has."""
    if isinstance(a, list) and isinstance(b, list):
        only = [[item for item in own if item not in other] for own, other in ((a, b), (b, a))]
        a, b = only if any(only) else (a, b)
    a, b = (", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in (a, b))
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - WIDTH // 3)
    return {key: ("..." if start else "") + _line(text[start:]) for key, text in (("a", a), ("b", b))}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns 0 whether or not runs differ, 2 for input that a person can fix."""
    p = argparse.ArgumentParser(
        prog="proto-route compare", description="Shows what changed between two finished runs."
    )
    p.add_argument("run_a", type=Path, metavar="RUN_A", help="the output folder of a finished run")
    p.add_argument("run_b", type=Path, metavar="RUN_B", help="another one, on the same query files")
    labels = "score both runs: files with id,target[,adapter], named like the query files, or their folders"
    p.add_argument("--labels", nargs="+", type=Path, default=(), metavar="CSV", help=labels)
    p.add_argument("--show", type=int, default=5, metavar="N", help="predictions to show (default: 5)")
    p.add_argument("--json", action="store_true", help="print JSON, with every prediction that differs")
    args = p.parse_args(argv)

    def work() -> None:
        found = compare(args.run_a, args.run_b, args.labels)
        if args.json:
            print(json.dumps(found, indent=2))
        else:
            show(found, open_console(), max(0, args.show))

    return exit_code(work)
