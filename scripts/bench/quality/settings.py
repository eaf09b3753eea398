"""What is asked of whom: the settings of the benchmark.

Every library answers its labelled queries in one run; a split of them (own phrasing, other phrasings, ...) is
a setting of its own in the tables.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from router.submission import adapters_of
from scripts.bench import libraries
from scripts.bench.libraries import Choice
from scripts.bench.score import labelled

STATIC = ("average", "task_arithmetic", "ties", "dare_ties", "knots", "tsv", "iso_c")
ROUTERS = ("cards", "logo", "mass", "arrow", "spectr", "lag")
OURS = "proto_route"
PEERS = (*STATIC, *ROUTERS)
EVERYONE = ("base", *PEERS, OURS, "per_query", "oracle")
SEEDS = {"dare_ties": (0, 1, 2)}  # whose masks are drawn; another seed of k-means changes next to nothing
FEWER = 14  # rows of each task, where the number of runs or of adapters is large
SKEW = 0.9
QUERIES = "queries"  # all labelled queries of a library, in one run
SLOW = ("ties", "dare_ties")  # their dense merge, once a task, would take as long as all else together


@dataclass(frozen=True)
class Part:
    """Queries that are answered in one run.

    Attributes:
        name: tells it from the others of its setting.
        rows: labelled rows, with the columns of `development.Labelled`.
        library: what the method may choose from, made from the library's adapters.
    """

    name: str
    rows: pd.DataFrame
    library: Choice = list


@dataclass(frozen=True)
class Setting:
    """A question to the methods.

    Attributes:
        methods: who is asked.
        parts: makes the runs of one method from a library's labelled queries.
        everywhere: whether it is asked of every library, or of the committed one alone.
    """

    name: str
    methods: tuple[str, ...]
    parts: Callable[[pd.DataFrame], list[Part]]
    everywhere: bool = False

    def seeds(self, method: str) -> tuple[int, ...]:
        """Which seeds a method runs with here; several only in the first setting, for their spread."""
        return SEEDS.get(method, (0,)) if self.name == QUERIES else (0,)


def _own(rows: pd.DataFrame, rows_per_task: int | None = None) -> pd.DataFrame:
    """The queries as phrased in training."""
    own = rows[rows["split"] == "own"]
    return own if rows_per_task is None else own.groupby("task").head(rows_per_task)


def _few(library: Choice) -> Callable[[pd.DataFrame], list[Part]]:
    return lambda rows: [Part("all", _own(rows, FEWER), library)]


def _composite() -> pd.DataFrame:
    return labelled("eval_composite").assign(split="composite", metric="exact")


def _left_out(rows: pd.DataFrame) -> list[Part]:
    own = _own(rows, FEWER)
    return [Part(str(task), part, libraries.without(str(task))) for task, part in own.groupby("task")]


def _singles(rows: pd.DataFrame) -> list[Part]:
    """Every adapter alone; where the labels name several adapters, those alone."""
    wanted = [adapters_of(label) for label in rows["adapter"]]
    composite = max(map(len, wanted)) > 1
    return [
        Part(name, rows[[not composite or name in some for some in wanted]], libraries.only(name))
        for name in sorted({name for some in wanted for name in some})
    ]


def _skewed(rows: pd.DataFrame) -> list[Part]:
    """For each task: its rows, and of all other rows so few that its own are 90 %."""
    every = _own(rows)
    parts = []
    for task, own in every.groupby("task"):
        others = every[every["task"] != task]
        count = round(len(own) * (1 - SKEW) / SKEW)
        picked = random.Random(f"skewed {task}").sample(range(len(others)), count)
        parts.append(Part(str(task), pd.concat([own, others.iloc[picked]], ignore_index=True)))
    return parts


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(QUERIES, EVERYONE, lambda rows: [Part("all", rows)], everywhere=True),
        Setting("left_out", ("base", *(m for m in PEERS if m not in SLOW), OURS), _left_out, everywhere=True),
        Setting("left_out_singles", ("single",), lambda rows: _singles(_own(rows, FEWER)), everywhere=True),
        Setting(
            "composite",
            tuple(m for m in EVERYONE if m != "oracle"),
            lambda rows: [Part("all", _composite())],
        ),
        Setting("composite_singles", ("single",), lambda rows: _singles(_composite())),
        Setting("skewed", (OURS,), _skewed),
        Setting("decoys_random", (OURS, *ROUTERS), _few(libraries.with_random)),
        Setting("decoys_rescaled", (OURS,), _few(libraries.with_rescaled)),
        Setting("decoys_duplicates", (OURS,), _few(libraries.with_duplicates)),
        Setting("scale", (OURS,), _few(libraries.grown)),
    )
}
