"""Explains one query of a finished run from its files: `proto-route explain output 7`. Loads no model."""

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from router.constants import BASE_COLUMN
from router.pipeline.evidence import LOW_MARGIN, Evidence
from router.runs.load import Run, cut, load, spelt
from router.runs.report.data import candidates, vote_means
from router.system.errors import InputError, printable

NEAREST = 8  # adapters shown for their score
LONG = 600  # characters shown of a text
BAR = 20  # characters of the longest bar
Rows = list[dict[str, Any]]
LEGEND = (
    "weight: softmax of the scores; score: calibrated response, in standard deviations of generic text, less "
    "for an adapter that was trained in another form; the "
    "base model's is what an adapter has to exceed, lower the larger the adapter's residual, what generic "
    "text does not explain of its score; response: root mean square cosine to the prototype. Adapters "
    "without a score, such as duplicates, are left out."
)


def explain(folder: Path, name: str) -> dict[str, Any]:
    """The facts that `--json` prints about the query `ID` or `STEM:ID`; None where nothing was kept.

    Raises:
        InputError: the folder holds no finished run, or it has no such id, or several.
    """
    run = load(folder)
    n = _find(run, name)
    query, e, label = run.queries[n], run.evidence, int(run.labels[n])
    rows = _candidates(run, n) if run.names else []
    variant = {"number": label, **asdict(run.record.variants[label])} if run.names else None
    return {
        "run": str(folder),
        "method": run.record.method,
        "file": run.stems[run.file[n]],
        "id": run.ids[n],
        "summary": "; ".join(_summary(rows, variant)),
        "query": asdict(query) | {"input": query.marked(int(e.later[n])) if e else query.input}
        if query
        else None,
        "frame": e.frames[int(e.frame[n])] if e else None,
        "answer": run.predictions[n],
        "candidates": rows,
        "variant": variant,
        "votes": _votes(e, n) if e else None,
    }


def _find(run: Run, name: str) -> int:
    """The row of the query that `ID` or `STEM:ID` stands for."""
    keys = run.keys
    rows = [n for n, key in enumerate(keys) if key == name] or [
        n for n, id_ in enumerate(run.ids) if id_ == name
    ]
    if len(rows) > 1:
        which = " or ".join(keys[n] for n in rows)
        raise InputError(f"{name!r} stands in {len(rows)} query files; say which: {which}")
    if not rows:
        near = get_close_matches(name, [*run.ids, *keys], 1, 0.5) or run.ids
        raise InputError(f"{run.folder}: expected the id of a query, such as {near[0]!r}, got {name!r}")
    return rows[0]


def _candidates(run: Run, n: int) -> Rows:
    """The candidates, those with a weight first, then by score; one without a score is left out."""
    rows = candidates(run.rows([n]), len(run.names))[0]
    return [
        dict(zip(("name", "weight", "score", "response"), (run.names[int(k)], *numbers), strict=False))
        for k, *numbers in rows
    ]


def _votes(e: Evidence, n: int) -> dict[str, Any]:
    """Mean votes, by kind of module, for the adapter with the highest score; a run keeps no others."""
    kinds, _, means = vote_means(e.votes[[n]], e.modules)
    of_kind = zip(kinds, means[:-1, -1].tolist(), strict=True)
    rows = [{"modules": kind, "mean": mean} for kind, mean in of_kind if np.isfinite(mean)]
    return {"adapter": e.adapters[e.best[n]], "residual": float(e.residual[n]), "means": rows}


def called(name: str | None) -> str:
    """The name of a candidate in a sentence."""
    return {BASE_COLUMN: "the base model", None: "no single one"}.get(name, str(name))


def _summary(rows: Rows, variant: Mapping[str, Any] | None) -> Iterator[str]:
    """Which candidate is the top one, and why."""
    if variant is None:
        yield "the method writes no routing table"
        return
    top = max(rows, key=lambda row: row["weight"])
    mix = variant["weights"]
    share = f"{top['weight']:.2f} of the weight"
    if (alike := sum(row["weight"] == top["weight"] for row in rows)) > 1:
        yield f"{alike} candidates have {share} each"
        return
    yield f"{called(top['name'])} has {share}"
    if variant["folder"] is None and any(mix[name] for name in mix if name != BASE_COLUMN):
        yield "averaged over tokens, since the adapters are mixed anew for each token"
        return
    if "score" in top:
        yield from _reasons(rows)
    mixed = max(mix, key=lambda name: mix[name])
    if mixed != top["name"]:
        yield f"but {called(mixed)} has more in the variant that answered"


def _reasons(rows: Rows) -> Iterator[str]:
    """The best score beside the base model's and the next one's, and what calibration changed."""
    first, second = sorted(rows, key=lambda row: -row["score"])[:2]
    level = next(row["score"] for row in rows if row["name"] == BASE_COLUMN)
    if first["name"] == BASE_COLUMN:
        yield f"no adapter scores above the base model, which stands at {level:.2f}"
    else:
        yield f"it scores {first['score']:.2f}"
        yield f"the base model stands at {level:.2f}"
    margin = first["score"] - second["score"]
    low = ", a low margin" if margin < LOW_MARGIN else ""
    yield f"the next candidate, {called(second['name'])}, is {margin:.2f} behind{low}"
    read = _strongest(rows)
    who = "it" if read is first else read["name"]
    yield f"of those with a score {who} had the strongest response before calibration"


def _strongest(rows: Rows) -> dict[str, Any]:
    return max(rows, key=lambda row: row.get("response", 0))


def open_console() -> Console:
    """The console for results: as wide as the terminal, or 100 characters if there is none."""
    return Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False, highlight=False)


def section(console: Console, title: str, *parts: str | Rows) -> None:
    """Prints texts and tables under a title."""
    console.print(Text(f"\n{printable(title)}", "bold"))
    for part in parts:
        if part:
            shown = Text(printable(part)) if isinstance(part, str) else _table(part)
            console.print(Padding(shown, (0, 0, 0, 2), expand=False))


def _table(rows: Rows) -> Table:
    """A table of rows under the keys of the first row; numbers are right-aligned and never wrap."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for key in rows[0]:
        words = any(isinstance(row[key], str) for row in rows)
        table.add_column(key, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(_cell(row[key]))) for key in rows[0]))
    return table


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def show(story: Mapping[str, Any], console: Console) -> None:
    """Prints a story."""
    where = f"{story['file']}:{story['id']} in {story['run']}, method {story['method']}"
    section(console, where, f"{story['summary']}.")
    query, variant, votes = story["query"], story["variant"], story["votes"]
    text = query["input"] if query else "not at hand: the query file is gone or has changed"
    choices = spelt(query["choices"] if query else ())
    section(console, "Query", cut(text, LONG), *(cut(choice, LONG) for choice in choices.values()))
    if any(story["frame"] or ()):
        before, after = story["frame"]
        frame = f"{cut(before, LONG)}{{query}}{cut(after, LONG)}"
        section(console, "Frame, in which it is compared with generic text", frame)
    section(console, "Answer", cut(choices.get(story["answer"], story["answer"]), LONG))
    if variant:
        rows = story["candidates"]
        aside = BASE_COLUMN, _strongest(rows)["name"]
        near = rows[:NEAREST] + [c for c in rows[NEAREST:] if c["weight"] >= 0.005 or c["name"] in aside]
        why = LEGEND if votes else "The run kept no evidence, so there are no scores or votes."
        section(console, f"Nearest {len(near)} of {len(rows)} candidates", near, why)
        shares = sorted(variant["weights"].items(), key=lambda share: -share[1])
        mix = ", ".join(f"{called(name)} {weight:.3f}" for name, weight in shares if weight >= 0.005)
        number, queries = variant["number"], variant["queries"]
        section(console, f"Variant {number}, which answers {queries} queries", mix)
    if votes:
        means = votes["means"]
        longest = max((abs(row["mean"]) for row in means), default=0) or 1
        rows = [row | {"": "#-"[row["mean"] < 0] * round(BAR * abs(row["mean"]) / longest)} for row in means]
        title = f"Votes for {votes['adapter']}, which had the highest score"
        section(console, f"{title} and a residual of {votes['residual']:.2f}", rows)


def flags(p: ArgumentParser) -> None:
    """The flags of `proto-route explain`."""
    p.add_argument("output", type=Path, metavar="OUTPUT", help="the output folder of a finished run")
    p.add_argument("id", metavar="ID", help="a query's id; STEM:ID if several query files have it")
    p.add_argument("--json", action="store_true", help="print JSON, with all candidates that have a score")


def work(args: Namespace) -> None:
    """Prints what `explain` tells."""
    story = explain(args.output, args.id)
    if args.json:
        print(json.dumps(story, indent=2))
    else:
        show(story, open_console())
