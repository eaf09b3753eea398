"""What changed between two finished runs on the same queries: `proto-route compare before after`.

Labels are read only here, after the fact, to score what both runs wrote; no method imports this.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from router.queries.submission import adapters_of, read_rows
from router.runs.explain import Rows, called, open_console, section
from router.runs.load import Run, load
from router.system.errors import InputError, exit_code
from router.system.files import is_folder

PARTS = ("flags", "base", "versions")  # of a record that decide a run
DRAWS = 2000
WIDTH = 48  # characters of a prediction or a setting shown


class Pair(NamedTuple):
    """A query as two runs answered it: the predictions `a` and `b`, and each run's top candidate.

    The label is its row of labels, empty if it has none.
    """

    file: str
    id: str
    a: str
    b: str
    source: str | None
    target: str | None
    label: dict[str, str]


def compare(a: Path, b: Path, labels: Sequence[Path] = ()) -> dict[str, Any]:
    """Compares two runs; returns what `--json` prints.

    Args:
        labels: CSV files with `id,target` and optionally `adapter`, named like the query files, or folders of
            such files.

    Raises:
        InputError: a folder holds no finished run, the queries differ, or there are no labels.
    """
    one, two = load(a), load(b)
    pairs = _pairs(one, two, _labels(labels, list(one.files)) if labels else {})
    moves: dict[tuple[str, str], list[str]] = {}
    for pair in pairs:
        if pair.source != pair.target:
            moves.setdefault((called(pair.source), called(pair.target)), []).append(pair.id)
    return {
        "a": str(a),
        "b": str(b),
        "queries": len(pairs),
        "settings": _settings(one.record.plain(), two.record.plain()),
        "moved": sum(map(len, moves.values())),
        "moves": [
            {"from": source, "to": target, "queries": len(ids), "ids": ids}
            for (source, target), ids in sorted(moves.items(), key=lambda move: -len(move[1]))
        ],
        "changes": [
            {"id": pair.id, "a": pair.a, "b": pair.b, "label": pair.label.get("target")}
            for pair in pairs
            if pair.a != pair.b
        ],
        "score": _score(pairs) if labels else None,
    }


def _pairs(one: Run, two: Run, labels: Mapping[tuple[str, str], dict[str, str]]) -> list[Pair]:
    if one.files.keys() != two.files.keys():
        got = " and ".join(f"{', '.join(run.files)} in {run.folder}" for run in (one, two))
        raise InputError(f"expected two runs on the same query files, got {got}")
    pairs = []
    for stem, mine in one.files.items():
        theirs = two.files[stem]
        if alone := sorted(set(mine.ids) ^ set(theirs.ids)):
            raise InputError(
                f"{mine.path.name}: expected the same ids in both runs, but {len(alone)} are in one alone, "
                f"such as {alone[0]!r}; run both on one query file"
            )
        place, tops, others = {name: n for n, name in enumerate(theirs.ids)}, mine.top, theirs.top
        for n, name in enumerate(mine.ids):
            k = place[name]
            asked, other = mine.queries[n], theirs.queries[k]
            if asked and other and asked != other:
                raise InputError(
                    f"expected two runs on the same queries, but {name!r} is another in {mine.path} than in "
                    f"{theirs.path}; run both on one query file"
                )
            full, label = f"{stem}:{name}" if len(one.files) > 1 else name, labels.get((stem, name), {})
            answers = mine.predictions[n], theirs.predictions[k]
            pairs.append(Pair(stem, full, *answers, tops[n], others[k], label))
    return pairs


def _settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> Rows:
    """What decides a run, as far as the two records differ."""
    one, two = (
        {"method": record["method"]}
        | {f"{part}.{name}": value for part in PARTS for name, value in record.get(part, {}).items()}
        | {"adapters": [f"{name} {of['sha256'][:12]}" for name, of in record.get("adapters", {}).items()]}
        for record in (a, b)
    )
    return [
        {"setting": name, "a": one.get(name), "b": two.get(name)}
        for name in one | two
        if one.get(name) != two.get(name) and name != "flags.output_folder"
    ]


def _labels(paths: Sequence[Path], stems: Sequence[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Rows of labels by stem and id."""
    files = [file for path in paths for file in (sorted(path.glob("*.csv")) if is_folder(path) else [path])]
    if not (of_runs := [file for file in files if file.stem in stems and file.exists()]):
        raise InputError(
            f"--labels {' '.join(map(str, paths))}: expected CSV files named as the query files "
            f"({', '.join(stems)}), or a folder of them; found none"
        )
    found: dict[tuple[str, str], dict[str, str]] = {}
    for file in of_runs:
        for line, row in read_rows(file, ("id", "target")):
            if (file.stem, row["id"]) in found:
                raise InputError(
                    f"--labels: {file}, line {line}: expected one row for each query, got a second one for "
                    f"{file.stem}:{row['id']:.60}"
                )
            found[file.stem, row["id"]] = row
    return found


def _score(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Shares of right answers, their means over files, and the interval of the paired difference."""
    rng, files, drawn = np.random.default_rng(0), [], []
    for stem in dict.fromkeys(pair.file for pair in pairs):
        mine = [pair for pair in pairs if pair.file == stem and pair.label]
        if not mine:
            continue
        right = np.array([[text.strip() == p.label["target"] for text in (p.a, p.b)] for p in mine], float)
        a, b = right.mean(0).tolist()
        tops = {"routed a": [p.source for p in mine], "routed b": [p.target for p in mine]}
        routes = {key: _routed(mine, of) for key, of in tops.items()}
        files.append({"file": stem, "queries": len(mine), "a": a, "b": b, **routes})
        # To draw queries with replacement is to draw how many were lost, equal and gained.
        steps = np.array([-1, 0, 1])
        shares = (right[:, 1:] - right[:, :1] == steps).mean(0)
        drawn.append(rng.multinomial(len(mine), shares, DRAWS) @ steps / len(mine))
    if not files:
        raise InputError("--labels: expected ids of the runs' queries, found none of them")
    low, high = np.quantile(np.mean(drawn, 0), (0.025, 0.975)).tolist()
    mean = {key: _mean([file[key] for file in files]) for key in ("a", "b", "routed a", "routed b")}
    files.append({"file": "mean over files", "queries": sum(file["queries"] for file in files), **mean})
    return {"files": files, "difference": mean["b"] - mean["a"], "low": low, "high": high}


def _mean(values: Sequence[float | None]) -> Any:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def _routed(pairs: Sequence[Pair], tops: Sequence[str | None]) -> float | None:
    """How often the top candidate is a labelled adapter; None if there is none, as in a static merge."""
    labels = [pair.label.get("adapter") for pair in pairs]
    right = [top in adapters_of(label) for label, top in zip(labels, tops, strict=True) if label]
    known = any(top for label, top in zip(labels, tops, strict=True) if label)
    return float(_mean(right)) if known else None


def show(found: Mapping[str, Any], console: Console, most: int) -> None:
    """Prints a comparison, with at most `most` of the predictions that differ."""
    section(console, f"A: {found['a']}\nB: {found['b']}")
    settings = [{"setting": row["setting"], **_apart(row["a"], row["b"])} for row in found["settings"]]
    section(console, f"Settings that differ: {len(settings)}", settings)
    total = found["queries"]
    moves = [row | {"ids": _line(", ".join(row["ids"]))} for row in found["moves"]]
    title = f"Top candidate: changed for {found['moved']} of {total} queries"
    section(console, title, moves)
    changes = [row | _apart(row["a"], row["b"]) for row in found["changes"][:most]]
    title = f"Predictions: {len(found['changes'])} of {total} differ, {len(changes)} shown"
    section(console, title, changes)
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


if __name__ == "__main__":
    sys.exit(main())
