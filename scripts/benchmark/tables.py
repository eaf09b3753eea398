"""From answers to scores, intervals and tables.

A score is the mean over tasks of the share of right answers. Intervals are the middle 95 % of 2,000
bootstrap draws of queries within each task; methods are compared on the same draws. Where a method ran
with several seeds, a query counts with its mean over them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from router.constants import BASE_COLUMN
from scripts.benchmark.cells import CELLS
from scripts.benchmark.libraries import skill_of
from scripts.benchmark.settings import EVERYONE, OURS, PEERS, SETTINGS, STATIC

DRAWS = 2000
QUALITY = Path("output/benchmark/quality.csv")
README, DETAILS = Path("README.md"), Path("docs/benchmark.md")
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
    "decoys_rescaled": "copies at 4 and 1/4 of the size added",
    "decoys_duplicates": "every adapter twice",
    "scale": "library grown to 200",
}


def answers() -> pd.DataFrame:
    """All answers on disk, one row each, with setting, method, seed, part, and whether well routed."""
    parts = [
        pd.read_csv(file, dtype={"id": str}).assign(
            setting=file.parts[-4], method=file.parts[-3], seed=int(file.parts[-2]), part=file.stem
        )
        for file in sorted(CELLS.glob("*/*/*/*.csv"))
        if file.parts[-4] in SETTINGS
    ]
    found = pd.concat(parts, ignore_index=True)
    found.loc[(found.setting == "unseen") & (found.adapter == BASE_COLUMN), "setting"] = NO_EXPERT
    found["found"] = [
        float(skill_of(routed) in adapter.split("+"))
        for routed, adapter in zip(found.routed, found.adapter, strict=True)
    ]
    return found


def records() -> pd.DataFrame:
    """What each run cost: seconds, peak memory, variants."""
    rows = [
        {"setting": f.parts[-4], "method": f.parts[-3], "part": f.stem, **json.loads(f.read_text("utf-8"))}
        for f in sorted(CELLS.glob("*/*/*/*.json"))
    ]
    return pd.DataFrame(rows)


class Scores:
    """The scores of all methods in one setting, with bootstrap draws that they share.

    Attributes:
        tasks: (tasks, methods) share of right answers.
        drawn: (draws, methods) mean over tasks in each draw.
    """

    def __init__(self, found: pd.DataFrame, column: str = "right") -> None:
        table = found.pivot_table(index=["task", "id"], columns="method", values=column, aggfunc="mean")
        self.queries = table.groupby(level="task").size()
        self.tasks = table.groupby(level="task").mean()
        rng = np.random.default_rng(0)
        drawn = []
        for _, part in table.groupby(level="task"):
            picks = rng.integers(len(part), size=(DRAWS, len(part)))
            drawn.append(part.to_numpy()[picks].mean(1))  # (draws, methods)
        self.drawn = pd.DataFrame(np.mean(drawn, 0), columns=table.columns)

    def value(self, statistic: Callable[[pd.Series], float]) -> tuple[float, float, float]:
        """A statistic of the methods' scores, and its interval."""
        drawn = [statistic(row) for _, row in self.drawn.iterrows()]
        low, high = np.quantile(drawn, (0.025, 0.975))
        return float(statistic(self.tasks.mean())), float(low), float(high)


def write() -> None:
    """Makes quality.csv from what is on disk and, if that is whole, the tables of the README and the docs."""
    found, costs = answers(), records()
    by_setting = {str(name): part for name, part in found.groupby("setting")}
    scores = {name: Scores(part) for name, part in by_setting.items()}
    _write_quality(found, scores, costs)
    if waiting := [name for name in SETTINGS if name not in scores]:
        print(f"no tables yet: nothing on disk for {', '.join(waiting)}", flush=True)
        return
    skills = found.drop_duplicates("task").set_index("task").skill
    DETAILS.write_text("\n".join(_details(scores, skills)), "utf-8")
    insert(README, "methods", methods_table(by_setting, scores, costs))
    insert(README, "targets", targets_table(by_setting, scores, costs))


def insert(path: Path, name: str, lines: Iterable[str]) -> None:
    """Replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` in a file."""
    text, start, end = path.read_text("utf-8"), f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"{path}: expected the lines {start.strip()} and {end}")
    head, rest = text.split(start, 1)
    path.write_text(head + start + "\n".join(lines) + "\n" + end + rest.split(end, 1)[1], "utf-8")


def _write_quality(found: pd.DataFrame, scores: dict[str, Scores], costs: pd.DataFrame) -> None:
    seconds = costs.groupby(["setting", "method"])[["seconds", "peak_mib", "variants"]].mean()
    rows = []
    for (setting, method), part in found.groupby(["setting", "method"]):
        cost = seconds.loc["unseen" if setting == NO_EXPERT else setting, method]
        drawn = scores[setting].drawn[method].quantile([0.025, 0.975])
        whole = {"task": "mean", "skill": "", "queries": part.groupby(["task", "id"]).ngroups}
        tasks = part.groupby("task")
        mean = {"score": tasks.right.mean().mean(), "routed": tasks.found.mean().mean()}
        extra = {"low": drawn.iloc[0], "high": drawn.iloc[1], **cost.to_dict()}
        rows.append({"setting": setting, "method": method, **whole, **mean, **extra})
        for task, own in tasks:
            what = {"task": task, "skill": own.skill.iloc[0], "queries": own.id.nunique()}
            mean = {"score": own.right.mean(), "routed": own.found.mean()}
            rows.append({"setting": setting, "method": method, **what, **mean})
    QUALITY.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).round(4).to_csv(QUALITY, index=False)


def _order(methods: Iterable[str]) -> list[str]:
    there = set(methods)
    return [method for method in EVERYONE if method in there]


def methods_table(
    by_setting: dict[str, pd.DataFrame], scores: dict[str, Scores], costs: pd.DataFrame
) -> list[str]:
    """Every method's score in every setting."""
    shown = [name for name in SHOWN if name in scores]
    header = [*(SHOWN[name] for name in shown), "routed", "routed, unseen", "seconds", "peak MiB"]
    lines = [f"| method | {' | '.join(header)} |", "| --- |" + " ---: |" * len(header)]
    held = costs[costs.setting == "held_in"].groupby("method")[["seconds", "peak_mib"]].mean()
    best = {name: scores[name].tasks.mean().drop("oracle", errors="ignore").max() for name in shown}
    for method in _order(scores["held_in"].tasks.columns):
        cells = []
        for name in shown:
            if method not in scores[name].tasks:
                cells.append("")
                continue
            value = scores[name].tasks[method].mean()
            low, high = scores[name].drawn[method].quantile([0.025, 0.975])
            text = f"{value:.3f}" if value < best[name] or method == "oracle" else f"**{value:.3f}**"
            cells.append(f"{text} ±{(high - low) / 2:.3f}")
        for name in ("held_in", "unseen"):
            part = by_setting[name]
            own = part[part.method == method]
            routes = method not in (*STATIC, "base") and len(own)
            cells.append(f"{own.groupby('task').found.mean().mean():.3f}" if routes else "")
        cells += [f"{held.seconds[method]:.0f}", f"{held.peak_mib[method]:.0f}"]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def targets_table(
    by_setting: dict[str, pd.DataFrame], scores: dict[str, Scores], costs: pd.DataFrame
) -> list[str]:
    """What was aimed at, what came, and whether that meets it."""
    lines = ["| setting | target | measured (95 % interval) | |", "| --- | --- | --- | --- |"]

    def row(setting: str, target: str, measured: str, met: bool) -> None:
        lines.append(f"| {setting} | {target} | {measured} | {'met' if met else 'missed'} |")

    def points(value: tuple[float, float, float]) -> str:
        return "{:+.1f} ({:+.1f} to {:+.1f}) points".format(*(100 * v for v in value))

    def plain(value: tuple[float, float, float]) -> str:
        return "{:.3f} ({:.3f} to {:.3f})".format(*value)

    for name, share, accuracy in (("held_in", 0.99, 0.98), ("unseen", 0.97, 0.95)):
        value = scores[name].value(lambda s: s[OURS] / s["oracle"])
        row(SHOWN[name], f"at least {share} of the oracle", plain(value), value[0] >= share)
        value = Scores(by_setting[name], "found").value(lambda s: s[OURS])
        row(SHOWN[name], f"routing accuracy at least {accuracy}", plain(value), value[0] >= accuracy)
    if "left_out" in scores and "left_out_singles" in by_setting:
        singles = by_setting["left_out_singles"]
        others = singles[singles.part != singles.adapter]
        best = others.groupby(["task", "part"]).right.mean().groupby(level="task").max().mean()
        value = scores["left_out"].value(lambda s: s[OURS] / best)
        row("left out", "at least 0.90 of the best remaining adapter", plain(value), value[0] >= 0.90)
        value = scores["left_out"].value(lambda s: s[OURS] - s["base"])
        row("left out", "above the base model", points(value), value[0] > 0)
        value = scores["left_out"].value(lambda s: s[OURS] - max(s[m] for m in STATIC if m in s))
        row("left out", "above every static merge", points(value), value[0] > 0)
    if NO_EXPERT in scores:
        value = scores[NO_EXPERT].value(lambda s: s[OURS] - s["base"])
        row("no expert", "at most 1 point below the base model", points(value), value[0] >= -0.01)
    if "composite" in scores and "composite_singles" in by_setting:
        singles = by_setting["composite_singles"].groupby(["task", "part"]).right.mean()
        best = singles.groupby(level="task").max().mean()
        value = scores["composite"].value(lambda s: s[OURS] - best)
        row("composite", "above the better of the two experts", points(value), value[0] > 0)
    if "skewed" in scores:
        own = by_setting["skewed"][lambda d: d.part == d.task].groupby("task").right.mean()
        change = 100 * (own - scores["held_in"].tasks[OURS].reindex(own.index))
        off = int((change.abs() > 2).sum())
        text = f"{change.min():+.1f} to {change.max():+.1f} points; {off} of {len(change)} tasks outside"
        row("skewed mixes", "within 2 points of the balanced mix, task by task", text, off == 0)
    for name, title in DECOYS.items():
        if name in scores and OURS in scores[name].tasks:
            limit = 1 if name == "decoys_random" else 2
            plain = by_setting["held_in"][lambda d: (d.method == OURS) & (d.seed == 0)]
            decoyed = by_setting[name][lambda d: d.method == OURS].assign(method="with decoys")
            plain = plain.merge(decoyed[["task", "id"]])  # the same queries
            both = pd.concat([plain, decoyed])
            value = Scores(both).value(lambda s: s["with decoys"] - s[OURS])
            row(
                title,
                f"costs at most {limit} point{'s' * (limit > 1)}",
                points(value),
                value[0] >= -limit / 100,
            )
    held = costs[(costs.setting == "held_in") & (costs.method == OURS)]
    n_tasks = len(scores["held_in"].tasks)
    count = held.variants.max()
    row(
        "variants",
        "at most 1.5 for each task present",
        f"{count} for {n_tasks} tasks",
        count <= 1.5 * n_tasks,
    )
    for name in ("held_in", "unseen"):
        if "per_query" in scores[name].tasks:
            value = scores[name].value(lambda s: s[OURS] - s["per_query"])
            title = f"variants, {SHOWN[name]}"
            row(title, "at most 0.5 points below per-query mixing", points(value), value[0] >= -0.005)
    for name in SHOWN:
        if name not in scores:
            continue
        there = [method for method in PEERS if method in scores[name].tasks]
        if not there:
            continue
        best = scores[name].tasks[there].mean().idxmax()
        if name == "held_in":
            value = scores[name].value(lambda s, best=best: (s[OURS] - s[best]) / s["oracle"])
            row(f"best peer, {SHOWN[name]}: `{best}`", "at least 5 points of the oracle's share above it",
                points(value), value[0] >= 0.05)  # fmt: skip
        else:
            value = scores[name].value(lambda s, best=best: s[OURS] - s[best])
            row(f"best peer, {SHOWN[name]}: `{best}`", "above it", points(value), value[0] > 0)
    return lines


def _details(scores: dict[str, Scores], skills: pd.Series) -> list[str]:
    """docs/benchmark.md: every method's score on every task, setting by setting."""
    lines = [
        "# Every method on every task",
        "",
        "Made by `python -m scripts.benchmark`; what the settings are is told",
    ]
    lines += ["in [method.md](method.md), and the summary is in the README. Shares of right answers.", ""]
    titles = {**SHOWN, **DECOYS}
    for name, title in titles.items():
        if name not in scores:
            continue
        tasks = scores[name].tasks
        methods = _order(tasks.columns)
        lines += [f"## {title[0].upper()}{title[1:]}", ""]
        lines += [f"| task | skill | {' | '.join(methods)} |", "| --- | --- |" + " ---: |" * len(methods)]
        for task, row in tasks.iterrows():
            lines.append(
                f"| {task} | {skills[task]} | " + " | ".join(f"{row[m]:.2f}" for m in methods) + " |"
            )
        for skill, part in tasks.groupby(skills.reindex(tasks.index)):
            row = part.mean()
            lines.append(f"| **mean** | {skill} | " + " | ".join(f"{row[m]:.3f}" for m in methods) + " |")
        mean = tasks.mean()
        lines.append("| **mean** | all | " + " | ".join(f"{mean[m]:.3f}" for m in methods) + " |")
        if mean.get("oracle"):
            share = mean / mean["oracle"]
            lines.append("| share of the oracle | | " + " | ".join(f"{share[m]:.3f}" for m in methods) + " |")
        lines.append("")
    return lines
