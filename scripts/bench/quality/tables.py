"""From answers to scores, intervals and tables.

A score is the mean over tasks of the share of right answers. Intervals are the middle 95 % of 2,000
bootstrap draws of queries within each task; methods are compared on the same draws. Where a method ran
with several seeds, a query counts with its mean over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from router.constants import BASE_COLUMN
from scripts.bench import runner
from scripts.bench.markdown import header, insert, row
from scripts.bench.quality.cells import COLUMNS, FOLDER
from scripts.bench.quality.settings import EVERYONE, OURS, PEERS, SETTINGS, STATIC
from scripts.bench.score import routed

DRAWS = 2000
QUALITY = Path("output/benchmark/quality.csv")
PAGE = Path("docs/benchmark.md")
# Of the queries in other phrasings those without an adapter are a setting of their own.
NO_EXPERT = "no_expert"
SHOWN = {
    "held_in": "held-in",
    "unseen": "unseen phrasing",
    "left_out": "left out",
    NO_EXPERT: "no expert",
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


class Scores:
    """The scores of all methods in one setting, with bootstrap draws that they share.

    Attributes:
        tasks: (tasks, methods) share of right answers.
        drawn: (draws, methods) mean over tasks in each draw.
    """

    def __init__(self, found: pd.DataFrame, column: str = "right") -> None:
        table = found.pivot_table(index=["task", "id"], columns="method", values=column, aggfunc="mean")
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
        answers: by setting one row an answer, with method, seed, part, and whether it was routed well.
        scores: by setting.
        costs: one row a run, with setting, method, seed and part.
    """

    answers: dict[str, pd.DataFrame]
    scores: dict[str, Scores]
    costs: pd.DataFrame

    def costs_of(self, setting: str, method: str) -> pd.DataFrame:
        """The runs of a method in a setting."""
        setting = "unseen" if setting == NO_EXPERT else setting
        return self.costs[(self.costs.setting == setting) & (self.costs.method == method)]


def read() -> Results:
    """Reads all cells.

    Raises:
        SystemExit: there are none.
    """
    answers, costs = [], []
    for (setting, method, seed), parts in runner.kept(FOLDER):
        for part in parts if setting in SETTINGS else ():
            where: dict[str, Any] = {"setting": setting, "method": method, "seed": int(seed)}
            where["part"] = part["part"]
            answers.append(pd.DataFrame(part["answers"], columns=list(COLUMNS)).assign(**where))
            costs.append(where | {key: part[key] for key in COSTS})
    if not answers:
        raise SystemExit(f"nothing in {FOLDER} yet; name --settings, or --all")
    found = pd.concat(answers, ignore_index=True)
    found.loc[(found.setting == "unseen") & (found.adapter == BASE_COLUMN), "setting"] = NO_EXPERT
    found["found"] = [
        float(routed(top, adapter)) for top, adapter in zip(found.routed, found.adapter, strict=True)
    ]
    by_setting = {str(name): part for name, part in found.groupby("setting")}
    return Results(by_setting, {name: Scores(part) for name, part in by_setting.items()}, pd.DataFrame(costs))


def write() -> None:
    """Makes quality.csv from what is on disk and, if that is whole, the tables of docs/benchmark.md."""
    results = read()
    _write_quality(results)
    if waiting := [name for name in SETTINGS if name not in results.scores]:
        print(f"no tables yet: nothing on disk for {', '.join(waiting)}", flush=True)
        return
    insert(PAGE, "methods", methods_table(results))
    insert(PAGE, "targets", targets_table(results))
    insert(PAGE, "tasks", tasks_tables(results))


def _write_quality(results: Results) -> None:
    rows: list[dict[str, Any]] = []
    for setting, found in results.answers.items():
        for method, part in found.groupby("method"):
            mine = {"setting": setting, "method": method}
            low, high = results.scores[setting].drawn[method].quantile([0.025, 0.975])
            tasks = part.groupby("task")
            rows.append(
                {**mine, "task": "mean", "skill": "", "queries": part.groupby(["task", "id"]).ngroups,
                 "score": tasks.right.mean().mean(), "routed": tasks.found.mean().mean(), "low": low,
                 "high": high, **results.costs_of(setting, str(method))[COSTS].mean()}
            )  # fmt: skip
            rows += [
                {**mine, "task": task, "skill": own.skill.iloc[0], "queries": own.id.nunique(),
                 "score": own.right.mean(), "routed": own.found.mean()}
                for task, own in tasks
            ]  # fmt: skip
    QUALITY.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(4).to_csv(QUALITY, index=False)


def _order(methods: Iterable[str]) -> list[str]:
    there = set(methods)
    return [method for method in EVERYONE if method in there]


def methods_table(results: Results) -> list[str]:
    """Every method's score in every setting."""
    scores = {name: results.scores[name] for name in SHOWN if name in results.scores}
    titles = [SHOWN[name] for name in scores]
    lines = header(["method", *titles, "routed", "routed, unseen", "seconds", "peak MiB"])
    best = {name: of.tasks.mean().drop("oracle", errors="ignore").max() for name, of in scores.items()}

    def score(name: str, method: str) -> str:
        if method not in scores[name].tasks:
            return ""
        value = scores[name].tasks[method].mean()
        low, high = scores[name].drawn[method].quantile([0.025, 0.975])
        text = f"{value:.3f}" if value < best[name] or method == "oracle" else f"**{value:.3f}**"
        return f"{text} ±{(high - low) / 2:.3f}"

    def accuracy(name: str, method: str) -> str:
        own = results.answers[name][lambda d: d.method == method]
        routes = method not in (*STATIC, "base") and len(own)
        return f"{own.groupby('task').found.mean().mean():.3f}" if routes else ""

    for method in _order(scores["held_in"].tasks.columns):
        costs = results.costs_of("held_in", method)[COSTS].mean()
        lines.append(
            row(
                f"`{method}`", *(score(name, method) for name in scores),
                accuracy("held_in", method), accuracy("unseen", method),
                f"{costs.seconds:.0f}", f"{costs.peak_mib:.0f}",
            )
        )  # fmt: skip
    return lines


def targets_table(results: Results) -> list[str]:
    """What was aimed at, what came, and whether that meets it."""
    parts = (_against_oracle, _without_expert, _composite, _skewed, _decoys, _variants, _against_peers)
    return [
        *header(["setting", "target", "measured (95 % interval)", ""], texts=4),
        *(
            row(setting, target, measured, "met" if met else "missed")
            for part in parts
            for setting, target, measured, met in part(results)
        ),
    ]


Target = tuple[str, str, str, bool]  # setting, target, measured, met
Targets = Iterator[Target]


def _points(value: Value) -> str:
    return "{:+.1f} ({:+.1f} to {:+.1f}) points".format(*(100 * v for v in value))


def _share(value: Value) -> str:
    return "{:.3f} ({:.3f} to {:.3f})".format(*value)


def _against_oracle(results: Results) -> Targets:
    for name, share, accuracy in (("held_in", 0.99, 0.98), ("unseen", 0.97, 0.95)):
        value = results.scores[name].value(lambda s: s[OURS] / s["oracle"])
        yield SHOWN[name], f"at least {share} of the oracle", _share(value), value[0] >= share
        value = Scores(results.answers[name], "found").value(lambda s: s[OURS])
        yield SHOWN[name], f"routing accuracy at least {accuracy}", _share(value), value[0] >= accuracy


def _without_expert(results: Results) -> Targets:
    scores, singles = results.scores["left_out"], results.answers["left_out_singles"]
    others = singles[singles.part != singles.adapter]
    best = others.groupby(["task", "part"]).right.mean().groupby(level="task").max().mean()
    value = scores.value(lambda s: s[OURS] / best)
    yield "left out", "at least 0.90 of the best remaining adapter", _share(value), value[0] >= 0.90
    value = scores.value(lambda s: s[OURS] - s["base"])
    yield "left out", "above the base model", _points(value), value[0] > 0
    value = scores.value(lambda s: s[OURS] - max(s[m] for m in STATIC if m in s))
    yield "left out", "above every static merge", _points(value), value[0] > 0
    value = results.scores[NO_EXPERT].value(lambda s: s[OURS] - s["base"])
    yield "no expert", "at most 1 point below the base model", _points(value), value[0] >= -0.01


def _composite(results: Results) -> Targets:
    singles = results.answers["composite_singles"].groupby(["task", "part"]).right.mean()
    best = singles.groupby(level="task").max().mean()
    value = results.scores["composite"].value(lambda s: s[OURS] - best)
    yield "composite", "above the better of the two experts", _points(value), value[0] > 0


def _skewed(results: Results) -> Targets:
    own = results.answers["skewed"][lambda d: d.part == d.task].groupby("task").right.mean()
    change = 100 * (own - results.scores["held_in"].tasks[OURS].reindex(own.index))
    off = int((change.abs() > 2).sum())
    text = f"{change.min():+.1f} to {change.max():+.1f} points; {off} of {len(change)} tasks outside"
    yield "skewed mixes", "within 2 points of the balanced mix, task by task", text, off == 0


def _decoys(results: Results) -> Targets:
    plain = results.answers["held_in"][lambda d: (d.method == OURS) & (d.seed == 0)]
    for name, title in DECOYS.items():
        limit = 1 if name == "decoys_random" else 2
        decoyed = results.answers[name][lambda d: d.method == OURS].assign(method="with decoys")
        both = pd.concat([plain.merge(decoyed[["task", "id"]]), decoyed])  # the same queries
        value = Scores(both).value(lambda s: s["with decoys"] - s[OURS])
        target = f"costs at most {limit} point{'s' * (limit > 1)}"
        yield title, target, _points(value), value[0] >= -limit / 100


def _variants(results: Results) -> Targets:
    n_tasks = len(results.scores["held_in"].tasks)
    count = results.costs_of("held_in", OURS).variants.max()
    met = bool(count <= 1.5 * n_tasks)
    yield "variants", "at most 1.5 for each task present", f"{count} for {n_tasks} tasks", met
    for name in ("held_in", "unseen"):
        value = results.scores[name].value(lambda s: s[OURS] - s["per_query"])
        target = "at most 0.5 points below per-query mixing"
        yield f"variants, {SHOWN[name]}", target, _points(value), value[0] >= -0.005


def _against_peers(results: Results) -> Targets:
    for name, title in SHOWN.items():
        yield _against_best(name, title, results.scores[name])


def _against_best(name: str, title: str, scores: Scores) -> Target:
    best = scores.tasks[[method for method in PEERS if method in scores.tasks]].mean().idxmax()
    what = f"best peer, {title}: `{best}`"
    if name == "held_in":
        value = scores.value(lambda s: (s[OURS] - s[best]) / s["oracle"])
        return what, "at least 5 points of the oracle's share above it", _points(value), value[0] >= 0.05
    value = scores.value(lambda s: s[OURS] - s[best])
    return what, "above it", _points(value), value[0] > 0


def tasks_tables(results: Results) -> list[str]:
    """Every method's score on every task, setting by setting."""
    lines = []
    for name, title in (SHOWN | DECOYS).items():
        tasks = results.scores[name].tasks
        skills: Any = results.answers[name].groupby("task").skill.first()
        methods, mean = _order(tasks.columns), tasks.mean()
        lines += [f"## {title[0].upper()}{title[1:]}", "", *header(["task", "skill", *methods], texts=2)]
        for task, shares in tasks.iterrows():
            lines.append(row(task, skills[task], *(f"{shares[m]:.2f}" for m in methods)))
        for skill, part in tasks.groupby(skills):
            lines.append(row("**mean**", skill, *(f"{part[m].mean():.3f}" for m in methods)))
        lines.append(row("**mean**", "all", *(f"{mean[m]:.3f}" for m in methods)))
        if mean.get("oracle"):
            share = mean / mean["oracle"]
            lines.append(row("share of the oracle", "", *(f"{share[m]:.3f}" for m in methods)))
        lines.append("")
    return lines[:-1]
