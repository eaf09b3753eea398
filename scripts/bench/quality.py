"""How well queries are answered, library by library: `python -m scripts.bench.quality --all`.

Every method answers the labelled queries of every library in a process of its own. Its answers are kept under
output/benchmark/quality, so a benchmark that was stopped goes on where it stood; delete a file there to run
that part again. Decoys, and conversations read otherwise, are routed and not answered. Writes the tables of
docs/results.md, and that of conversations in docs/serving.md.

A score is the mean over tasks of the mean score of an answer. Intervals are the middle 95 % of 2,000
bootstrap draws of queries within each task; methods are compared on the same draws.
"""

import ast
import json
import math
import sys
import tempfile
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd

from router.constants import BASE_COLUMN
from router.library.adapters import load_library
from router.methods import load_method, method_names
from router.model.base import load_base
from router.model.frames import Frame, Parts
from router.model.template import Template
from router.pipeline.context import Context
from router.pipeline.reading import parts_of
from router.queries.submission import MULTIPLE_CHOICE, Query, read_queries
from router.routing.gate import PrototypeGate
from router.settings import Settings
from scripts.bench import development, runner
from scripts.bench import libraries as made
from scripts.bench.development import CHATS, FITS, FOREIGN, Labelled, libraries
from scripts.bench.libraries import Choice
from scripts.bench.markdown import header, insert, row
from scripts.bench.score import read_texts, routed, score
from scripts.library.tasks.conversations import ALPACA

PAGE, CHAT_PAGE = Path("docs/results.md"), Path("docs/serving.md")
OURS, QUERIES = "proto_route", "queries"
METHODS = (OURS, "base", "oracle")
FLAN = 5  # rows of each FLAN task with one right answer, since the others would make all answers long
LOSABLE = 4  # queries that the base model answers rightly, in part at least; with fewer, points say nothing
DRAWS = 2000
SHOWN = {
    "own": "familiar wording", "unseen": "new wording", "mc": "multiple choice", "none": "no adapter fits",
    "foreign": "foreign queries", "flan": "FLAN tasks", "turns": "several turns", "follow": "follow-ups",
    "change": "change of subject", "under": "foreign under a job's system message",
}  # fmt: skip
DECOYS: dict[str, tuple[str, Choice]] = {
    "random": ("30 random adapters added", made.with_random),
    "rescaled": (
        "duplicates at 4 and 1/4 of the size added",
        made.scaled("rescaled", {"x4": 4.0, "x0.25": 0.25}),
    ),
    "duplicates": ("every adapter twice", made.scaled("duplicates", {"twin": 1.0})),
    "grown": ("library grown to 200", made.grown),
    "alpaca": ("queries in an Alpaca frame", list),
}
# What of a conversation tells its adapter, in other ways than ours.
READINGS: dict[str, Callable[[Query, Template, Settings], list[Parts]]] = {
    "the whole conversation": lambda query, template, _: whole(query, template),
    "the first message": lambda query, template, _: template.turns(query.conversation)[:1],
    "the last message": lambda query, template, _: template.turns(query.conversation)[-1:],
}
TURNS = {"turns": "a job after others", "follow": "a follow-up", "change": "a foreign question after a job"}
COLUMNS = ("split", "task", "id", "adapter", "score", "routed", "weight")
Verdict = tuple[str, str, str, bool]  # setting, target, measured, met


def asked(of: Labelled, method: str = OURS) -> pd.DataFrame:
    """The queries that a method answers: of FLAN a few with one right answer.

    The oracle is asked where an adapter fits and the base model where none does, unless the answers to a
    library's queries came with it.
    """
    flan = of.rows["split"] == "flan"
    few = of.rows[flan & (of.rows["metric"] == "em")].groupby("task").head(FLAN)
    rows = pd.concat([of.rows[~flan], few], ignore_index=True)
    there = ["none"] if brought(of, method) is not None else []
    splits = {"oracle": FITS, "base": [split for split in FOREIGN if split not in there]}
    return rows[rows["split"].isin(splits.get(method, development.SPLITS))].reset_index(drop=True)


def brought(of: Labelled, method: str) -> pd.DataFrame | None:
    """The answers of a method that came with a library, as rows of COLUMNS; None if it brought none."""
    file = of.adapters[0].parent / "reference" / f"{method}.csv"
    if not file.exists():
        return None
    rows = of.rows[~of.rows["split"].isin(["foreign", "flan"])].merge(read_texts(file), on="id")
    tops = rows["adapter"] if method == "oracle" else BASE_COLUMN
    return rows.assign(score=_scores(rows), routed=tops, weight=1.0)[list(COLUMNS)]


def answer(library: str, setting: str, name: str) -> dict[str, Any]:
    """What a method makes of a library's queries: under `answers` rows of COLUMNS.

    Args:
        setting: QUERIES, or one of DECOYS or READINGS, whose queries are routed alone, so that their score is
            NaN; `alpaca` changes the queries, not the adapters.
    """
    (of,) = (one for one in libraries() if one.name == library)
    base, adapters = load_base(of.base, dtype="float32"), load_library(list(map(str, of.adapters)))
    if setting in DECOYS:
        adapters = DECOYS[setting][1](adapters)
    rows = asked(of, name)
    if setting == "alpaca":
        rows["input"] = rows["input"].map(ALPACA.format)
    if setting in READINGS:
        rows = rows[rows["split"].isin(TURNS)]
    # No longer text than the longest target can be right, so nothing is lost by stopping there.
    longest = max(map(len, base.tokenizer(list(rows["target"]))["input_ids"])) + 1
    made: Any = load_method(name)
    with tempfile.TemporaryDirectory() as folder:
        file, template = _written(rows, Path(folder)), of.adapters[0].parent / "template.jinja"
        settings = Settings(
            (file,), Path(folder), max_gen_len=longest, chat_template=template if template.exists() else None
        )
        queries, method = read_queries(file), made(name, base, adapters, Context(settings))
        if setting == QUERIES:
            result = method.answer(queries, Path(folder))
            weights = result.decision.routing.weights
            scores: Any = _scores(rows.assign(prediction=[one.text for one in result.answers]))
        else:
            with patch("router.pipeline.reading.parts_of", READINGS.get(setting, parts_of)):
                weights, scores = method.route(queries, method.encoded(queries)).weights, math.nan
    names = [*(adapter.name for adapter in adapters), BASE_COLUMN]
    tops = [names[top] for top in weights.argmax(1)]
    found = rows.assign(score=scores, routed=tops, weight=weights.max(1).round(4))
    return {"answers": found[list(COLUMNS)].to_numpy().tolist()}


def _scores(rows: pd.DataFrame) -> list[float]:
    """How good the predictions are."""
    return [score(*one) for one in zip(rows["metric"], rows["prediction"], rows["target"], strict=True)]


def whole(query: Query, template: Template) -> list[Parts]:
    """All of a conversation in one text."""
    before, after = template.frame
    text = template.text(query.conversation)
    start = len(before) if text.startswith(before) else 0
    return [Parts(text[:start], text[start : len(text) - len(after)], after, Frame(before, after))]


def _written(rows: pd.DataFrame, folder: Path) -> Path:
    """The query file of some labelled queries."""
    file, lines = folder / "queries.jsonl", []
    for n, of in enumerate(rows.to_dict("records")):
        messages = json.loads(of["messages"] or "[]")
        line: dict[str, Any] = {"messages": messages} if messages else {"input": of["input"]}
        line |= {key: of[key] for key in ("adapter", "eval_type")} | {"id": str(n)}
        if of["eval_type"] == MULTIPLE_CHOICE:
            line["answer_choices"] = list(ast.literal_eval(of["answer_choices"]))
        lines.append(json.dumps(line) + "\n")
    file.write_text("".join(lines), "utf-8")
    return file


def by_task(found: pd.DataFrame) -> Any:
    """The scores of all methods in one split of a library, (queries, methods), task by task."""
    known = found.dropna(subset=["score"])  # not where nobody knows the right answer
    table = known.pivot_table(index=["task", "id"], columns="method", values="score", aggfunc="mean")
    return table.groupby(level="task")


def compared(found: pd.DataFrame, statistic: Callable[[Any], float]) -> tuple[float, float, float]:
    """A statistic of the methods' means over tasks, and its interval by draws that the methods share."""
    tasks, rng, drawn = by_task(found), np.random.default_rng(0), []
    for _, rows in tasks:
        picks = rng.integers(len(rows), size=(DRAWS, len(rows)))
        drawn.append(rows.to_numpy()[picks].mean(1))  # (draws, methods)
    means = pd.DataFrame(np.mean(drawn, 0), columns=tasks.mean().columns)
    low, high = np.quantile([statistic(one) for _, one in means.iterrows()], [0.025, 0.975])
    return float(statistic(tasks.mean().mean())), float(low), float(high)


def read() -> pd.DataFrame:
    """Every answer that was kept: COLUMNS, and library, setting, method, and whether it was routed well.

    Raises:
        SystemExit: there is nothing.
    """
    answers = []
    for (library, setting, method), found in runner.kept("quality"):
        rows = pd.DataFrame(found["answers"], columns=list(COLUMNS))
        answers.append(rows.assign(library=library, setting=setting, method=method))
    if not answers:
        raise SystemExit(f"nothing in {runner.folder('quality')} yet; pass --all, or names")
    for of in libraries():
        for method in ("base", "oracle"):
            if (there := brought(of, method)) is not None:
                answers.append(there.assign(library=of.name, setting=QUERIES, method=method))
    table = pd.concat(answers, ignore_index=True)
    pairs = zip(table.routed, table.adapter, strict=True)
    return table.assign(right=[float(routed(top, adapter)) for top, adapter in pairs])


def names(answers: pd.DataFrame) -> list[str]:
    """The libraries, those that no constant was chosen on first."""
    return sorted(answers["library"].unique(), key=lambda name: (name == development.COMMITTED, name))


def part(
    answers: pd.DataFrame, library: str, split: str, *methods: str, setting: str = QUERIES
) -> pd.DataFrame:
    """The answers of these methods in one split; none if a method is missing."""
    a = answers[answers.method.isin(methods)]
    found = a[(a.library == library) & (a.split == split) & (a.setting == setting)]
    return found if set(methods) <= set(found.method) else found[:0]


def scores_table(answers: pd.DataFrame) -> list[str]:
    """Our score in each split of each library / the best that is known, and how often we route rightly."""
    lines = header(["library", *SHOWN.values()])
    for library in names(answers):
        cells = []
        for split in SHOWN:
            ours = part(answers, library, split, OURS)
            beside = part(answers, library, split, "oracle" if split in FITS else "base")
            right = f"({_mean(ours, 'right', 2)})" if len(ours) else ""
            scores = [_mean(found, "score", 3) for found in (ours, beside)]
            cells.append(" ".join(filter(None, ("/".join(filter(None, scores)), right))))
        lines.append(row(library, *cells))
    return lines


def _mean(found: pd.DataFrame, column: str, digits: int) -> str:
    """The mean over tasks of a column where it is known; "" if it is nowhere."""
    known = found.dropna(subset=[column])
    return f"{known.groupby('task')[column].mean().mean():.{digits}f}" if len(known) else ""


def targets(answers: pd.DataFrame, library: str) -> Iterator[Verdict]:
    """What was aimed at, and what came."""
    for split, share in (("own", 0.98), ("unseen", 0.80), ("mc", 0.92)):
        if len(found := part(answers, library, split, OURS, "oracle")):
            value = compared(found, lambda s: s[OURS] / s["oracle"])
            aim = f"at least {share:.2f} of the oracle's score"
            yield SHOWN[split], aim, "{:.3f} ({:.3f}…{:.3f})".format(*value), value[0] >= share
    beside = {split: part(answers, library, split, OURS, "base") for split in FOREIGN}
    settings = [(SHOWN[split], found, 1) for split, found in beside.items()]
    foreign = beside["foreign"]
    for form in development.FORMS:  # of the library that has all
        settings.append((f"foreign queries, {form}", foreign[foreign.task.str.startswith(f"{form}: ")], 2))
    for title, found, most in settings:
        if (found[found.method == "base"].score > 0).sum() >= LOSABLE:  # points can be lost
            value = compared(found, lambda s: 100 * (s[OURS] - s["base"]))
            points = "{:+.1f} ({:+.1f}…{:+.1f})".format(*value)
            yield title, f"points against the base model, at least -{most}", points, value[0] >= -most
    sent = [1 - one.right.mean() for split in FOREIGN[:3] if len(one := part(answers, library, split, OURS))]
    if sent:
        rate, promised = float(np.mean(sent)), PrototypeGate().false_positive_rate
        aim = f"false positives within a factor of 2 of the {promised:g} promised"
        yield "mean of the foreign kinds", aim, f"{rate:.3f}", 1 / 2 <= rate / promised <= 2


def limits(answers: pd.DataFrame, library: str) -> Iterator[Verdict]:
    """What the limits of docs/results.md are taken from: the worst kind of each split, and decoys."""
    for split in FOREIGN:
        if len(found := part(answers, library, split, OURS, "base")):
            tasks = by_task(found).mean()
            lost = (tasks[OURS] - tasks["base"]).sort_values()
            text = f"{100 * lost.iloc[0]:+.1f} points ({lost.index[0]})"
            yield SHOWN[split], "each kind at most 3 below", text, lost.iloc[0] >= -0.03
    for name, (title, _) in DECOYS.items():
        ours = answers[(answers.library == library) & (answers.method == OURS)]
        shares = ours.pivot_table(index="split", columns="setting", values="right")
        if {QUERIES, name} <= set(shares.columns):
            change = 100 * (shares[name] - shares[QUERIES]).dropna()
            text = f"{change.mean():+.1f} points routed rightly; worst split {change.min():+.1f}"
            yield title, "costs at most 0.5 points", text, float(change.mean()) >= -0.5


def targets_table(answers: pd.DataFrame) -> list[str]:
    """Targets, and what came in each library that an oracle answered, too."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    libraries = [name for name in names(answers) if len(part(answers, name, "own", OURS, "oracle"))]
    for library in libraries:
        for setting, target, measured, met in targets(answers, library):
            cell = f"{measured}{'' if met else ' **missed**'}"
            found.setdefault((setting, target), {})[library] = cell
    return [
        *header(["setting", "target", *libraries], texts=2),
        *(row(*key, *(cells.get(name, "") for name in libraries)) for key, cells in found.items()),
    ]


def turns_table(answers: pd.DataFrame) -> list[str]:
    """Shares of conversations whose candidate is right, by what is read; empty until all is measured."""
    readings = {name: name for name in READINGS} | {QUERIES: "each message, and stay"}
    lines = header(["library", "read", *TURNS.values()], texts=2)
    for library, (setting, title) in product(CHATS, readings.items()):
        parts = [part(answers, library, split, OURS, setting=setting) for split in TURNS]
        if not all(map(len, parts)):
            return []
        lines.append(row(library, title, *(_mean(one, "right", 2) for one in parts)))
    return lines


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--all", action="store_true", help="all settings and METHODS; hours on two cores")
    here = {library.name: library for library in libraries()}
    settings = (QUERIES, *DECOYS, *READINGS)
    parser.add_argument("--libraries", nargs="+", choices=here, help="only these")
    parser.add_argument(
        "--settings", nargs="+", choices=settings, help="only these (with --libraries: all but decoys)"
    )
    parser.add_argument("--methods", nargs="+", choices=method_names(), default=METHODS, help="only these")
    args = parser.parse_args()
    named = (QUERIES, *READINGS) if args.libraries else ()
    chosen = args.libraries or list(here)
    wanted = [
        ((library, setting, method), partial(answer, library, setting, method))
        for setting in (settings if args.all else args.settings or named)
        for method in (args.methods if setting == QUERIES else (OURS,))
        for library in (chosen[:1] if setting in DECOYS else chosen)
        if method != "oracle" or brought(here[library], method) is None
        if setting not in READINGS or library in CHATS
    ]
    failed = runner.fill("quality", wanted)
    answers = read()
    if (answers.setting == QUERIES).any():
        insert(PAGE, "scores", scores_table(answers))
        insert(PAGE, "targets", targets_table(answers))
    if lines := turns_table(answers):
        insert(CHAT_PAGE, "conversations", lines)
    for library in names(answers):
        for setting, target, measured, met in limits(answers, library):
            print(f"{library}, {setting}, {target}: {measured}, {'met' if met else 'missed'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
