"""Explains one query of a finished run: `proto-route explain output 7`.

Tells from the run's files how strongly each adapter responded, how that compares with generic text, which
variant answered, and why. Only `--answers` loads a model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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

from router.constants import BASE_COLUMN, Device
from router.pipeline.evidence import LOW_MARGIN, Evidence
from router.queries.submission import MULTIPLE_CHOICE, Query
from router.runs.load import Run, load
from router.runs.report.data import best_of, places_of
from router.system.errors import InputError, exit_code, printable

NEAREST = 8  # adapters shown for their score
LONG = 600  # characters shown of a text
BAR = 20  # characters of the longest bar
Rows = list[dict[str, Any]]
THIRDS = ("first third of the layers", "middle third", "last third")
LEGEND = """response: root mean square cosine to the prototype; score: calibrated response, in standard
deviations of generic text (a duplicate has none); of the base model what an adapter has to
exceed, which is lower the larger the adapter's residual, what generic text does not explain of
its score; weight: softmax of the scores"""


def explain(folder: Path, name: str, answers: bool = False) -> dict[str, Any]:
    """What `--json` prints about the query `ID` or `STEM:ID`; None marks what was not kept or measured.

    Raises:
        InputError: the folder holds no finished run, or it has no such id, or several.
    """
    run = load(folder)
    n = _find(run, name)
    query, e, label, candidates = run.queries[n], run.evidence, int(run.labels[n]), _candidates(run, n)
    variant = asdict(run.record.variants[label]) if candidates else None
    return {
        "run": str(folder),
        "method": run.record.method,
        "file": run.stems[run.file[n]],
        "id": run.ids[n],
        "summary": _summary(candidates, variant) if variant else "the method writes no routing table",
        "query": asdict(query) if query else None,
        "frame": e.frames[int(e.frame[n])] if e else None,
        "answer": run.predictions[n],
        "base_answer": _base_answer(run, query) if answers else None,
        "candidates": candidates,
        "variant": {"number": label, **variant} if variant else None,
        "votes": _votes(e, n) if e else None,
    }


def _find(run: Run, name: str) -> int:
    """The row of the query that `ID` or `STEM:ID` stands for."""
    keys = run.keys
    rows = [n for n, pair in enumerate(zip(keys, run.ids, strict=True)) if name in pair]
    if len(rows) > 1:
        which = " or ".join(keys[n] for n in rows)
        raise InputError(f"{name!r} stands in {len(rows)} query files; say which: {which}")
    if not rows:
        near = get_close_matches(name, [*run.ids, *keys], 1, 0.5) or run.ids
        raise InputError(f"{run.folder}: expected the id of a query, such as {near[0]!r}, got {name!r}")
    return rows[0]


def _candidates(run: Run, n: int) -> Rows:
    """The adapters, best score first (without evidence, top weight first), and then the base model."""
    if not run.names:
        return []
    e, level = run.evidence, run.weights[n, :-1]
    columns: dict[str, list[Any]] = {"name": run.names}
    if e:
        level = np.nan_to_num(e.scores[n], nan=-np.inf)
        columns |= {
            "response": [*_numbers(e.responses[n]), None],
            "rank": [*(1 + (-e.responses[n]).argsort().argsort()).tolist(), None],
            "score": _numbers(e.candidates[n]),
        }
    columns["weight"] = run.weights[n].tolist()
    order = [*np.argsort(-level, kind="stable").tolist(), -1]
    return [{key: column[k] for key, column in columns.items()} for k in order]


def _numbers(values: Iterable[Any]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _votes(e: Evidence, n: int) -> dict[str, Any]:
    """Mean votes for the adapter with the highest score; a run keeps no others."""
    layers, kinds = places_of(e.modules)
    votes, deepest = e.votes[n].tolist(), max(layers, default=0)
    by_depth = sorted(zip(layers, votes, strict=True))
    thirds = [(THIRDS[3 * layer // (deepest + 1)], vote) for layer, vote in by_depth if layer >= 0]
    groups: dict[str, list[float]] = {}
    for name, vote in [*zip(kinds, votes, strict=True), *thirds]:
        if np.isfinite(vote):
            groups.setdefault(name, []).append(vote)
    means = [{"modules": name, "count": len(of), "mean": sum(of) / len(of)} for name, of in groups.items()]
    return {"adapter": e.adapters[best_of(e)[n]], "residual": float(e.residual[n]), "means": means}


def called(name: str | None) -> str:
    """What a candidate is called in a sentence."""
    return {BASE_COLUMN: "the base model", None: "no single one"}.get(name, str(name))


def _summary(candidates: Rows, variant: dict[str, Any]) -> str:
    """Which candidate is the top one, and why, in one sentence."""
    top, mix = max(candidates, key=lambda c: c["weight"]), variant["weights"]
    share = f"{top['weight']:.2f} of the weight"
    if (alike := sum(c["weight"] == top["weight"] for c in candidates)) > 1:
        return f"{alike} candidates have {share} each"
    told = f"{called(top['name'])} has {share}"
    if variant.get("folder") is None and any(mix[name] for name in mix if name != BASE_COLUMN):
        return f"{told}, averaged over tokens, since the adapters are mixed anew for each token"
    mixed = max(mix, key=lambda name: mix[name])
    other = [f"but {called(mixed)} has more in the variant that answered"] if mixed != top["name"] else []
    reasons = _reasons(candidates, top) if "score" in top else ()
    return "; ".join([told, *reasons, *other])


def _reasons(candidates: Rows, top: dict[str, Any]) -> Iterator[str]:
    """Its score beside the base model's, whether its margin is low, and what calibration changed."""
    *adapters, base = candidates
    first, second = sorted((c for c in candidates if c["score"] is not None), key=lambda c: -c["score"])[:2]
    level = f"{base['score']:.2f}"
    if top is base:
        yield f"no adapter scores above the base model, which stands at {level}"
        yield f"the nearest is {adapters[0]['name']} at {adapters[0]['score']:.2f}"
    else:
        yield f"it scores {top['score']:.2f}"
        yield f"the base model stands at {level}"
    if (margin := first["score"] - second["score"]) < LOW_MARGIN:
        yield f"its margin is low: {called(second['name'])} is only {margin:.2f} behind"
    read = min(adapters, key=lambda c: c["rank"])
    yield f"{'it' if read is top else read['name']} had the strongest response before calibration"


def _base_answer(run: Run, query: Query | None) -> str:
    """What the base model answers by itself, with the run's settings; on a CPU where the run's card is gone.

    Raises:
        InputError: the query's text or the base model is not at hand, or the model has other weights now.
    """
    recorded = run.record.base
    if query is None or recorded is None:
        missing = "the query's text" if query is None else "a base model in run.json"
        raise InputError(f"--answers: expected {missing}, found none; leave --answers out")
    from router.model.answer import answers, encode
    from router.model.base import EMBEDDED, EMBEDDED_ID, load_base
    from router.model.template import template_of

    name, revision, settings = recorded.name, recorded.revision, run.settings
    spec = f"{name}@{revision}" if revision else EMBEDDED if name == EMBEDDED_ID else name
    device: Device = "cpu" if recorded.device == "cpu" else "auto"
    base = load_base(spec, device, recorded.dtype, settings.device_map)
    if base.sha256 != recorded.sha256:
        raise InputError(
            f"--answers: expected the base model of the run, {spec} (sha256 {recorded.sha256[:12]}), got "
            f"other weights ({base.sha256[:12]}); leave --answers out"
        )
    template = template_of(base.tokenizer, settings.chat_template)
    text = template.text(query.conversation, query.id) if query.messages else query.input
    rows = encode(base.tokenizer, [text], settings.max_seq_len)
    choices = [query.choices if query.eval_type == MULTIPLE_CHOICE else ()]
    how: dict[str, Any] = {"scoring": settings.scoring, "max_new_tokens": settings.max_gen_len}
    return answers(base.model, base.tokenizer, rows, choices, **how)[0].text


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
    found = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for key in rows[0]:
        words = any(isinstance(row[key], str) for row in rows)
        found.add_column(key, justify="left" if words else "right", no_wrap=not words, overflow="fold")
    for row in rows:
        found.add_row(*(Text(printable(_cell(row[key]))) for key in rows[0]))
    return found


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)


def show(story: Mapping[str, Any], console: Console) -> None:
    """Prints a story."""
    where = f"{story['file']}:{story['id']} in {story['run']}, method {story['method']}"
    section(console, where, f"{story['summary']}.")
    query, variant, votes = story["query"], story["variant"], story["votes"]
    text = _shortened(query["input"]) if query else "not at hand: the query file is gone or has changed"
    choices = query["choices"] if query and query["eval_type"] == MULTIPLE_CHOICE else ()
    numbered = {str(n): f"{n}: {_shortened(choice)}" for n, choice in enumerate(choices)}
    section(console, "Query", text, *numbered.values())
    if any(story["frame"] or ()):
        before, after = map(_shortened, story["frame"])
        section(console, "Frame, in which it is compared with generic text", f"{before}{{query}}{after}")
    for title, key in (("Answer", "answer"), ("Answer of the base model", "base_answer")):
        if story[key] is not None:
            section(console, title, numbered.get(story[key]) or _shortened(story[key]) or "(empty)")
    if variant:
        *adapters, base = story["candidates"]
        also = [c for c in adapters[NEAREST:] if c["weight"] >= 0.005 or c.get("rank") == 1]
        rows = [*adapters[:NEAREST], *also, base]
        why = LEGEND if votes else "The run kept no evidence, so there are no scores or votes."
        section(console, f"Nearest {len(rows) - 1} of {len(adapters)} adapters", rows, why)
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


def _shortened(text: str) -> str:
    text, half = text.strip("\n"), LONG // 2
    return text if len(text) <= LONG else f"{text[:half]} [... {len(text) - LONG} more ...] {text[-half:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for input that a person can fix."""
    p = argparse.ArgumentParser(
        prog="proto-route explain", description="Explains why one query of a finished run got its answer."
    )
    p.add_argument("output", type=Path, metavar="OUTPUT", help="the output folder of a finished run")
    p.add_argument("id", metavar="ID", help="a query's id; STEM:ID if several query files have it")
    p.add_argument("--answers", action="store_true", help="load the base model and show its answer too")
    p.add_argument("--json", action="store_true", help="print JSON, with all adapters and the whole query")
    args = p.parse_args(argv)

    def work() -> None:
        story = explain(args.output, args.id, args.answers)
        if args.json:
            print(json.dumps(story, indent=2))
        else:
            show(story, open_console())

    return exit_code(work)
