"""Compares two finished runs on the same queries: `proto-route compare before after`.

Labels are read only here, after the fact, to score what both runs wrote; no method imports this.
"""

import json
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console

from router.constants import TEMPLATE
from router.pipeline.record import Record
from router.queries.submission import adapters_of, label_of, read_rows
from router.runs.explain import Rows, called, open_console, section
from router.runs.load import Run, cut, load
from router.system.errors import InputError
from router.system.files import is_folder

PARTS = ("flags", "base", "versions")  # of a record that decide a run
LABELS = 10  # of a file, for an interval
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
    both = joined(one, two)
    rows = _labels(labels, one.stems) if labels else {}
    for name, column in (("label", "target"), ("adapter", "adapter")):  # None where there is none
        both[name] = pd.Series([rows.get(key, {}).get(column) for key in both.index], both.index, object)
    changed = both[both["answer A"] != both["answer B"]]
    both["from"], both["to"] = both["top A"].map(called), both["top B"].map(called)
    moved = both[both["from"] != both["to"]]
    moves = [
        {"from": source, "to": target, "queries": len(ids), "ids": ids.tolist()}
        for (source, target), ids in moved.groupby(["from", "to"], sort=False)["id"]
    ]
    columns = {"id": "id", "answer A": "a", "answer B": "b", "label": "label"}
    return {
        "a": str(a),
        "b": str(b),
        "queries": len(both),
        "settings": _settings(one.record, two.record),
        "moved": len(moved),
        "moves": sorted(moves, key=lambda move: -move["queries"]),
        "changes": changed[list(columns)].rename(columns=columns).to_dict("records"),
        "score": _score(both, {*one.names, *two.names}) if labels else None,
    }


def joined(one: Run, two: Run) -> pd.DataFrame:
    """The queries of two runs by `STEM:ID`: of each run, A and B, the answer, the variant, the top candidate.

    Raises:
        InputError: the runs are not on the same queries.
    """
    keys, place = one.keys, {key: n for n, key in enumerate(two.keys)}
    if alone := sorted(place.keys() ^ set(keys)):
        raise InputError(
            f"expected the same queries in both runs, but {len(alone)} are in one alone, such as "
            f"{alone[0]!r}; run both on the same query files"
        )
    two = two.rows([place[key] for key in keys])
    names = {path.name for path in one.record.paths}
    other_files = {n for n in names if one.record.queries.get(n) != two.record.queries.get(n)}
    for key, number, asked, other in zip(keys, one.file, one.queries, two.queries, strict=True):
        gone = not (asked and other) and one.record.paths[number].name in other_files
        if gone or (asked and other and asked != other):
            raise InputError(
                f"expected two runs on the same queries, but {key!r} is another in {one.folder} than in "
                f"{two.folder}; run both on one query file"
            )
    both = pd.DataFrame({"id": keys if len(one.stems) > 1 else one.ids}, keys)
    both["file"] = [one.stems[number] for number in one.file]
    for side, run in (("A", one), ("B", two)):
        both[f"answer {side}"], both[f"variant {side}"] = run.predictions, run.labels
        level = [np.flatnonzero(row == row.max(initial=0)) for row in run.weights]
        # None if several are level, as in a static merge, or there is none.
        tops = [run.names[best[0]] if len(best) == 1 else None for best in level]
        both[f"top {side}"] = pd.Series(tops, keys, object)
    return both


def _settings(a: Record, b: Record) -> Rows:
    """The settings and versions in which two records differ."""
    one, two = (
        {"method": record.method}
        | {f"{part}.{name}": value for part in PARTS for name, value in plain.get(part, {}).items()}
        | {
            "adapters": [
                f"{name} {(adapter.content or adapter.sha256)[:12]}"
                for name, adapter in record.adapters.items()
            ]
        }
        | {"chat template": record.files.get(TEMPLATE)}
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
    if not (of_runs := [file for file in files if file.stem in stems and os.access(file, os.F_OK)]):
        raise InputError(
            f"--labels {' '.join(map(str, paths))}: expected CSV files named as the query files "
            f"({', '.join(stems)}), or a folder of them; found none"
        )
    rows: dict[str, dict[str, str]] = {}
    for file in of_runs:
        for line, row in read_rows(file, ("id", "target")):
            where = f"--labels: {file}, line {line}"
            columns = [column for column in ("target", "adapter") if row.get(column) is not None]
            given = {column: label_of(row, column, where) for column in columns}
            if rows.setdefault(f"{file.stem}:{row['id']}", given) is not given:
                raise InputError(
                    f"{where}: expected one row for each query, got a second one for {row['id']:.60}"
                )
    return rows


def _score(both: pd.DataFrame, names: Container[str]) -> dict[str, Any]:
    """Shares of right answers, their means over files, and the interval of the paired difference."""
    known = both[both["label"].notna()]
    if known.empty:
        raise InputError("--labels: expected ids of the runs' queries, found none of them")
    right = pd.DataFrame({"file": known["file"]})
    for side in "AB":
        right[side.lower()] = (known[f"answer {side}"].str.strip() == known["label"].str.strip()).astype(
            float
        )
    for side in "AB":  # how often the top candidate is a labelled adapter, unless there is none
        pairs = zip(known[f"top {side}"], known["adapter"], strict=True)
        routed = [float(top in adapters_of(gold, names)) if top and gold else np.nan for top, gold in pairs]
        right[f"routed {side.lower()}"] = routed
    groups = right.groupby("file", sort=False)
    means = groups.mean()
    steps = (right["b"] - right["a"]).groupby(right["file"], sort=False)
    variance, enough = (steps.var() / steps.size()).sum(), (steps.size() >= LABELS).all()
    # Where all differences are alike, labels do not say how far others would be.
    spread = 1.96 * float(np.sqrt(variance)) / len(means) if enough and variance else None
    means.insert(0, "queries", groups.size())
    means.loc["mean over files"] = means.mean()
    means.loc["mean over files", "queries"] = len(known)
    files = means.astype({"queries": int}).reset_index().astype(object).where(lambda df: df.notna(), None)
    difference = float((means["b"] - means["a"]).iloc[-1])
    return {
        "files": files.to_dict("records"),
        "difference": difference,
        "low": None if spread is None else max(-1.0, difference - spread),
        "high": None if spread is None else min(1.0, difference + spread),
    }


def show(changed: Mapping[str, Any], console: Console, most: int) -> None:
    """Prints a comparison, with at most `most` of the predictions that differ."""
    section(console, f"A: {changed['a']}\nB: {changed['b']}")
    settings = [{"setting": row["setting"], **_apart(row["a"], row["b"])} for row in changed["settings"]]
    section(console, f"Settings that differ: {len(settings)}", settings)
    total = changed["queries"]
    moves = [row | {"ids": cut(", ".join(row["ids"]), WIDTH)} for row in changed["moves"]]
    section(console, f"Top candidate: changed for {changed['moved']} of {total} queries", moves)
    changes = [row | _apart(row["a"], row["b"]) for row in changed["changes"][:most]]
    section(
        console, f"Predictions: {len(changed['changes'])} of {total} differ, {len(changes)} shown", changes
    )
    if score := changed["score"]:
        text = f"B - A: {100 * score['difference']:+.1f} points, "
        if score["low"] is None:
            text += f"without an interval: each file needs {LABELS} labels, and differences have to vary"
        else:
            text += f"95 % interval {100 * score['low']:+.1f} to {100 * score['high']:+.1f} (paired by query)"
        section(console, "Shares of right answers and of right routes", score["files"], text)


def _apart(a: Any, b: Any) -> dict[str, str]:
    """Two values, each on one line from shortly before they differ; of two lists, what only one has."""
    if isinstance(a, list) and isinstance(b, list):
        only = [[item for item in mine if item not in other] for mine, other in ((a, b), (b, a))]
        a, b = only if any(only) else (a, b)
    a, b = (", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in (a, b))
    same = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(0, same - WIDTH // 3)
    before = "…" if start else ""
    return {key: before + cut(text[start:], WIDTH).replace("\n", "\\n") for key, text in (("a", a), ("b", b))}


def flags(p: ArgumentParser) -> None:
    """The flags of `proto-route compare`."""
    p.add_argument("run_a", type=Path, metavar="RUN_A", help="the output folder of a finished run")
    p.add_argument("run_b", type=Path, metavar="RUN_B", help="another one, on the same query files")
    labels = "score both runs: files with id,target[,adapter], named like the query files, or their folders"
    p.add_argument("--labels", nargs="+", action="extend", type=Path, default=[], metavar="CSV", help=labels)
    p.add_argument("--show", type=int, default=5, metavar="N", help="predictions to show (default: 5)")
    p.add_argument("--json", action="store_true", help="print JSON, with every prediction that differs")


def work(args: Namespace) -> None:
    """Prints what `compare` finds."""
    comparison = compare(args.run_a, args.run_b, args.labels)
    if args.json:
        print(json.dumps(comparison, indent=2))
    else:
        show(comparison, open_console(), max(0, args.show))
