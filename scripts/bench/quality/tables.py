"""From answers to scores, intervals and tables.

A score is the mean over tasks of the mean score of an answer; the graded metric is the mean over tasks of the
reference's log-probability per token. Intervals are the middle 95 % of 2,000 bootstrap draws of queries
within each task; methods are compared on the same draws. Where a method ran with several seeds, a query
counts with its mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from router.constants import BASE_COLUMN
from router.routing.gate import PrototypeGate
from scripts.bench import runner
from scripts.bench.development import COMMITTED, SPLITS
from scripts.bench.markdown import header, insert, row
from scripts.bench.quality.cells import COLUMNS, FOLDER, GRADED
from scripts.bench.quality.settings import EVERYONE, OURS, PEERS, QUERIES, SETTINGS, STATIC
from scripts.bench.score import routed

DRAWS = 2000
QUALITY = Path("output/benchmark/quality.csv")
PAGE = Path("docs/benchmark.md")
SHOWN = {
    "own": "own phrasing",
    "unseen": "other phrasings",
    "mc": "multiple choice",
    "none": "no adapter fits",
    "foreign": "foreign queries",
    "left_out": "left out",
    "composite": "composite",
}
DECOYS = {
    "decoys_random": "30 random adapters added",
    "decoys_rescaled": "duplicates at 4 and 1/4 of the size added",
    "decoys_duplicates": "every adapter twice",
    "scale": "library grown to 200",
}
COSTS = ["seconds", "peak_mib", "variants"]

Value = tuple[float, float, float]  # a statistic, and its interval
Key = tuple[str, str]  # a library and a setting; of the setting `queries`, a split


class Scores:
    """The scores of all methods in one setting, with bootstrap draws that they share.

    Attributes:
        tasks: (tasks, methods) mean of the column.
        drawn: (draws, methods) mean over tasks in each draw.
    """

    def __init__(self, found: pd.DataFrame, column: str = "score") -> None:
        known = found.dropna(subset=[column])  # not where nobody knows the right answer
        if known.empty:
            self.tasks = self.drawn = pd.DataFrame()
            return
        table = known.pivot_table(index=["task", "id"], columns="method", values=column, aggfunc="mean")
        self.tasks = table.groupby(level="task").mean()
        rng = np.random.default_rng(0)
        drawn = []
        for _, part in table.groupby(level="task"):
            picks = rng.integers(len(part), size=(DRAWS, len(part)))
            drawn.append(part.to_numpy()[picks].mean(1))  # (draws, methods)
        self.drawn = pd.DataFrame(np.mean(drawn, 0), columns=table.columns)

    def value(self, statistic: Callable[[Any], float]) -> Value:
        """A statistic of the methods' scores, and its interval."""
        drawn = [statistic(scores) for _, scores in self.drawn.iterrows()]
        low, high = np.quantile(drawn, (0.025, 0.975))
        return float(statistic(self.tasks.mean())), float(low), float(high)


@dataclass(frozen=True)
class Results:
    """What is on disk.

    Attributes:
        answers: by library and setting one row an answer, with method, seed, part, and whether it was routed
            well.
        costs: one row a run, with library, setting, method, seed and part.
    """

    answers: dict[Key, pd.DataFrame]
    costs: pd.DataFrame

    def scores(self, library: str, setting: str, column: str = "score") -> Scores:
        """The scores of all methods there."""
        return Scores(self.answers[library, setting], column)

    def costs_of(self, library: str, setting: str, method: str) -> pd.DataFrame:
        """The runs of a method in a setting."""
        costs = self.costs
        return costs[(costs.library == library) & (costs.setting == setting) & (costs.method == method)]

    @property
    def libraries(self) -> list[str]:
        """Their names, the committed one last."""
        return sorted({library for library, _ in self.answers}, key=lambda name: (name == COMMITTED, name))


def read() -> Results:
    """Reads all cells.

    Raises:
        SystemExit: there are none.
    """
    answers, costs = [], []
    kept = dict(runner.kept(FOLDER))
    whole = {cell[:-1] for cell in kept if cell[-1] != GRADED}
    for (library, setting, method, seed), parts in kept.items():
        if setting not in SETTINGS or (seed == GRADED and (library, setting, method) in whole):
            continue
        for part in parts:
            where: dict[str, Any] = {"library": library, "setting": setting, "method": method}
            where |= {"seed": 0 if seed == GRADED else int(seed), "part": part["part"]}
            answers.append(pd.DataFrame(part["answers"], columns=list(COLUMNS)).assign(**where))
            cost = {key: part[key] for key in COSTS} | ({"seconds": np.nan} if seed == GRADED else {})
            costs.append(where | cost)
    if not answers:
        raise SystemExit(f"nothing in {FOLDER} yet; name --settings, or --all")
    found = pd.concat(answers, ignore_index=True)
    found["setting"] = found["split"].where(found["setting"] == QUERIES, found["setting"])
    found["found"] = [
        float(routed(top, adapter)) for top, adapter in zip(found.routed, found.adapter, strict=True)
    ]
    by_setting = {
        (str(library), str(setting)): part
        for (library, setting), part in found.groupby(["library", "setting"])
    }
    return Results(by_setting, pd.DataFrame(costs))


def write() -> None:
    """Makes quality.csv and the tables of docs/benchmark.md from what is on disk."""
    results = read()
    QUALITY.parent.mkdir(parents=True, exist_ok=True)
    quality(results).round(4).to_csv(QUALITY, index=False)
    insert(PAGE, "methods", methods_tables(results))
    insert(PAGE, "targets", targets_table(results))
    insert(PAGE, "tasks", tasks_tables(results))


def quality(results: Results) -> pd.DataFrame:
    """One row for each library, setting, method and task."""
    parts = []
    for (library, setting), found in results.answers.items():
        groups = found.groupby(["method", "task"])
        table = groups[["score", "nats", "found"]].mean().assign(queries=groups.id.nunique()).reset_index()
        parts.append(table.assign(library=library, setting=setting))
    columns = ["library", "setting", "method", "task", "queries", "score", "nats", "found"]
    return pd.concat(parts, ignore_index=True)[columns]


def _order(methods: Iterable[str]) -> list[str]:
    there = set(methods)
    return [method for method in EVERYONE if method in there]


def methods_tables(results: Results) -> list[str]:
    """Every method's score and graded metric in every setting, a table for each library."""
    lines: list[str] = []
    for library in results.libraries:
        names = [name for name in SHOWN if (library, name) in results.answers]
        scores = {name: results.scores(library, name) for name in names}
        nats = {name: results.scores(library, name, "nats") for name in names}
        best = {name: of.tasks.mean().drop("oracle", errors="ignore").max() for name, of in scores.items()}
        lines += ["", f"### {library}", ""]
        lines += header(["method", *(SHOWN[name] for name in names), "seconds", "peak MiB"])
        for method in _order({str(m) for of in nats.values() for m in of.tasks}):
            cells = []
            for name in names:
                if method not in scores[name].tasks:
                    graded = nats[name].tasks.get(method)
                    cells.append("" if graded is None else f"{graded.mean():.2f}")
                    continue
                value = scores[name].tasks[method].mean()
                low, high = scores[name].drawn[method].quantile([0.025, 0.975])
                text = f"{value:.3f}" if value < best[name] or method == "oracle" else f"**{value:.3f}**"
                cells.append(f"{text} ±{(high - low) / 2:.3f}, {nats[name].tasks[method].mean():.2f}")
            costs = results.costs_of(library, QUERIES, method)[COSTS].mean()
            taken = "" if np.isnan(costs.seconds) else f"{costs.seconds:.0f}"
            lines.append(row(f"`{method}`", *cells, taken, f"{costs.peak_mib:.0f}" if taken else ""))
    return lines[1:]


def targets_table(results: Results) -> list[str]:
    """What was aimed at, what came in each library, and whether that meets it."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for library in results.libraries:
        for part in TARGETS:
            for setting, target, measured, met in part(results, library):
                cell = f"{measured}{'' if met else ' **missed**'}"
                found.setdefault((setting, target), {})[library] = cell
    return [
        *header(["setting", "target", *results.libraries], texts=2),
        *(row(*key, *(cells.get(name, "") for name in results.libraries)) for key, cells in found.items()),
    ]


Target = tuple[str, str, str, bool]  # setting, target, measured, met
Targets = Iterator[Target]


def _points(value: Value) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f}) points".format(*(100 * v for v in value))


def _share(value: Value) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*value)


def _nats(value: Value) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f}) nats".format(*value)


def _there(results: Results, library: str, setting: str, *methods: str, column: str = "score") -> bool:
    """Whether these methods were asked there, and what a column has of them."""
    found = results.answers.get((library, setting))
    return found is not None and set(methods) <= set(found.method[found[column].notna()])


def _lead(scores: Scores, over: Any) -> Value:
    """Ours less a method's, named, or less a number."""
    return scores.value(lambda s: s[OURS] - s.get(over, over))


def _against_oracle(results: Results, library: str) -> Targets:
    for name, share in (("own", 0.99), ("unseen", 0.90), ("mc", 0.97)):
        if _there(results, library, name, OURS, "oracle"):
            value = results.scores(library, name).value(lambda s: s[OURS] / s["oracle"])
            yield SHOWN[name], f"at least {share:.2f} of the oracle", _share(value), value[0] >= share
    if _there(results, library, "own", OURS, column="found"):
        value = results.scores(library, "own", "found").value(lambda s: s[OURS])
        yield SHOWN["own"], "routing accuracy at least 0.98", _share(value), value[0] >= 0.98


def _without_adapter(results: Results, library: str) -> Targets:
    for name in ("none", "foreign"):
        if _there(results, library, name, OURS, "base"):
            found = results.answers[library, name]
            for answers, note in ((found, ""), (_rounded_alike(found), ", but for rounding")):
                scores = Scores(answers)
                value = scores.value(lambda s: s[OURS] - s["base"])
                aim = f"at most 1 point below the base model{note}"
                yield SHOWN[name], aim, _points(value), value[0] >= -0.01
                lost = (scores.tasks[OURS] - scores.tasks["base"]).sort_values()
                text = f"{100 * lost.iloc[0]:+.1f} points ({lost.index[0]})"
                yield SHOWN[name], f"the same in every kind{note}", text, lost.iloc[0] >= -0.01
            value = results.scores(library, name, "found").value(lambda s: s[OURS])
            yield SHOWN[name], "at least 0.85 left to the base model", _share(value), value[0] >= 0.85
            if name == "foreign":
                sent, promised = 1 - value[0], PrototypeGate().false_alarm
                aim = f"false alarms within a factor of 2 of the {promised:g} promised"
                yield SHOWN[name], aim, f"{sent:.3f}", 1 / 2 <= sent / promised <= 2


def _rounded_alike(found: pd.DataFrame) -> pd.DataFrame:
    """The answers with the base model's own score wherever a method left a query to it.

    Its batches are others then, and in half precision some of its answers are, too.
    """
    base = found[found.method == "base"]
    own = dict(zip(zip(base.task, base.id, strict=True), base.score, strict=True))
    same = pd.Series([own[key] for key in zip(found.task, found.id, strict=True)], found.index)
    return found.assign(score=found.score.where(found.routed != BASE_COLUMN, same))


def _left_out(results: Results, library: str) -> Targets:
    if not _there(results, library, "left_out", OURS, "base", column="nats"):
        return
    scores = results.scores(library, "left_out", "nats")
    value = scores.value(lambda s: s[OURS] - s["base"])
    yield "left out", "likelihood above the base model's", _nats(value), value[0] > 0
    merges = [m for m in STATIC if m in scores.tasks]
    if merges:
        value = scores.value(lambda s: s[OURS] - max(s[m] for m in merges))
        yield "left out", "likelihood above every static merge's", _nats(value), value[0] > 0
    if _there(results, library, "left_out_singles"):
        singles = results.answers[library, "left_out_singles"]
        others = singles[singles.part != singles.adapter]
        best = others.groupby(["task", "part"]).nats.mean().groupby(level="task").max().mean()
        value = _lead(scores, best)
        yield "left out", "likelihood of the best remaining adapter's", _nats(value), value[0] >= 0


def _composite(results: Results, library: str) -> Targets:
    for column, text in (("score", _points), ("nats", _nats)):
        ours = _there(results, library, "composite", OURS, column=column)
        if ours and _there(results, library, "composite_singles", "single", column=column):
            singles = results.answers[library, "composite_singles"].groupby(["task", "part"])[column].mean()
            best = singles.groupby(level="task").max().mean()
            value = _lead(results.scores(library, "composite", column), best)
            what = "score" if column == "score" else "likelihood"
            yield "composite", f"{what} above the better of the two experts'", text(value), value[0] > 0


def _skewed(results: Results, library: str) -> Targets:
    if not _there(results, library, "skewed", OURS) or not _there(results, library, "own", OURS):
        return
    skewed = results.answers[library, "skewed"]
    own = skewed[skewed.part == skewed.task].groupby("task").score.mean()
    change = 100 * (own - results.scores(library, "own").tasks[OURS].reindex(own.index))
    off = int((change.abs() > 2).sum())
    text = f"{change.min():+.1f} to {change.max():+.1f} points; {off} of {len(change)} tasks outside"
    yield "skewed mixes", "within 2 points of the balanced mix, task by task", text, off == 0


def _decoys(results: Results, library: str) -> Targets:
    for name, title in DECOYS.items():
        if not _there(results, library, name, OURS) or not _there(results, library, "own", OURS):
            continue
        plain = results.answers[library, "own"][lambda d: (d.method == OURS) & (d.seed == 0)]
        limit = 1 if name == "decoys_random" else 2
        decoyed = results.answers[library, name][lambda d: d.method == OURS].assign(method="with decoys")
        both = pd.concat([plain.merge(decoyed[["task", "id"]]), decoyed])  # the same queries
        value = Scores(both).value(lambda s: s["with decoys"] - s[OURS])
        target = f"costs at most {limit} point{'s' * (limit > 1)}"
        yield title, target, _points(value), value[0] >= -limit / 100


def _variants(results: Results, library: str) -> Targets:
    if not _there(results, library, "own", OURS):
        return
    asked = [results.answers.get((library, name)) for name in SPLITS if name != "foreign"]
    tasks = len({task for part in asked if part is not None for task in part.task})
    count = results.costs_of(library, QUERIES, OURS).variants.max()
    yield "variants", "at most 1.5 for each task", f"{count} for {tasks} tasks", bool(count <= 1.5 * tasks)
    for name in ("own", "unseen"):
        if _there(results, library, name, OURS, "per_query"):
            value = results.scores(library, name).value(lambda s: s[OURS] - s["per_query"])
            target = "at most 0.5 points below per-query mixing"
            yield f"variants, {SHOWN[name]}", target, _points(value), value[0] >= -0.005


def _against_peers(results: Results, library: str) -> Targets:
    for name, title in SHOWN.items():
        if not _there(results, library, name, OURS, column="nats"):
            continue
        scores = results.scores(library, name, "nats")
        if peers := [method for method in PEERS if method in scores.tasks]:
            best = scores.tasks[peers].mean().idxmax()
            value = _lead(scores, best)
            yield f"peers, {title}", "likelihood above each", f"{_nats(value)} (`{best}`)", value[0] > 0


TARGETS: tuple[Callable[[Results, str], Targets], ...] = (
    _against_oracle, _without_adapter, _left_out, _composite, _skewed, _decoys, _variants, _against_peers,
)  # fmt: skip


def tasks_tables(results: Results) -> list[str]:
    """Every method's score on every task, library by library and setting by setting."""
    lines = []
    for library in results.libraries:
        for name, title in (SHOWN | DECOYS).items():
            if (library, name) not in results.answers:
                continue
            tasks = results.scores(library, name).tasks
            if tasks.empty:
                continue
            methods, mean = _order(tasks.columns), tasks.mean()
            lines += [f"## {library}: {title}", "", *header(["task", *methods])]
            for task, values in tasks.iterrows():
                lines.append(row(task, *(f"{values[m]:.2f}" for m in methods)))
            lines.append(row("**mean**", *(f"{mean[m]:.3f}" for m in methods)))
            if mean.get("oracle"):
                share = mean / mean["oracle"]
                lines.append(row("share of the oracle", *(f"{share[m]:.3f}" for m in methods)))
            lines.append("")
    return lines[:-1]
