"""What is asked of whom: the settings of the benchmark."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from scripts.bench import libraries
from scripts.bench.libraries import Choice
from scripts.bench.score import labelled

STATIC = ("average", "task_arithmetic", "ties", "dare_ties", "knots", "tsv", "iso_c")
ROUTERS = ("cards", "logo", "mass", "arrow", "spectr", "lag")
OURS = "proto_route"
PEERS = (*STATIC, *ROUTERS)
EVERYONE = ("base", *PEERS, OURS, "per_query", "oracle")
SEEDS = {OURS: (0, 1, 2), "dare_ties": (0, 1, 2)}  # where something is drawn: k-means, DARE's masks
FEWER = 14  # rows of each task, where the number of runs or of adapters is large
SKEW = 0.9
SLOW = ("ties", "dare_ties")  # their dense merge, once a task, would take as long as all else together


@dataclass(frozen=True)
class Part:
    """Queries that are answered in one run.

    Attributes:
        name: tells it from the others of its setting.
        rows: the labelled rows, with a column `task`.
        library: what the method may choose from, made from the committed adapters.
    """

    name: str
    rows: pd.DataFrame
    library: Choice = list


@dataclass(frozen=True)
class Setting:
    """A question to the methods.

    Attributes:
        methods: who is asked.
        parts: makes the runs of one method.
    """

    name: str
    methods: tuple[str, ...]
    parts: Callable[[], list[Part]]

    def seeds(self, method: str) -> tuple[int, ...]:
        """Which seeds a method runs with here; several only in the first setting, for their spread."""
        return SEEDS.get(method, (0,)) if self.name == "held_in" else (0,)


def _whole(folder: str, library: Choice = list, rows_per_task: int | None = None) -> list[Part]:
    return [Part("all", labelled(folder, rows_per_task), library)]


def _left_out() -> list[Part]:
    rows = labelled("eval", FEWER)
    return [Part(str(task), part, libraries.without(str(task))) for task, part in rows.groupby("task")]


def _singles(folder: str, rows_per_task: int | None = None) -> list[Part]:
    """Every adapter alone; where the labels name several adapters, those alone."""
    rows = labelled(folder, rows_per_task)
    wanted = [label.split("+") for label in rows["adapter"]]
    composite = max(map(len, wanted)) > 1
    return [
        Part(name, rows[[not composite or name in some for some in wanted]], libraries.only(name))
        for name in sorted({name for some in wanted for name in some})
    ]


def _skewed() -> list[Part]:
    """For each task: its rows, and of all other rows so few that its own are 90 %."""
    rows = labelled("eval")
    parts = []
    for task, own in rows.groupby("task"):
        others = rows[rows["task"] != task]
        count = round(len(own) * (1 - SKEW) / SKEW)
        picked = random.Random(f"skewed {task}").sample(range(len(others)), count)
        parts.append(Part(str(task), pd.concat([own, others.iloc[picked]], ignore_index=True)))
    return parts


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("held_in", EVERYONE, lambda: _whole("eval")),
        Setting("unseen", EVERYONE, lambda: _whole("eval_unseen")),
        Setting("composite", tuple(m for m in EVERYONE if m != "oracle"), lambda: _whole("eval_composite")),
        Setting("composite_singles", ("single",), lambda: _singles("eval_composite")),
        Setting("left_out", ("base", *(m for m in PEERS if m not in SLOW), OURS), _left_out),
        Setting("left_out_singles", ("single",), lambda: _singles("eval", FEWER)),
        Setting("skewed", (OURS,), _skewed),
        Setting("decoys_random", (OURS, *ROUTERS), lambda: _whole("eval", libraries.with_random, FEWER)),
        Setting("decoys_rescaled", (OURS,), lambda: _whole("eval", libraries.with_rescaled, FEWER)),
        Setting("decoys_duplicates", (OURS,), lambda: _whole("eval", libraries.with_duplicates, FEWER)),
        Setting("scale", (OURS,), lambda: _whole("eval", libraries.grown, FEWER)),
    )
}
