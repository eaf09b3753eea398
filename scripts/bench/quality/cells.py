"""One method in one setting: the answers to each part's queries, and what they cost."""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from router.constants import BASE_COLUMN
from router.context import Context
from router.library.adapters import Adapter, load_library
from router.methods import load_method
from router.model.base import Base, load_base
from router.pipeline import Routed
from router.result import Result, Routing
from router.routing.variants import VARIANTS
from router.settings import Settings
from router.stages import peak_mib
from router.submission import Query, read_queries
from scripts.bench.development import libraries
from scripts.bench.quality.likelihood import grading, of_references, with_references
from scripts.bench.quality.per_query import PerQuery
from scripts.bench.quality.settings import SETTINGS, Part
from scripts.bench.score import reference, score
from scripts.bench.timer import timed

FOLDER = Path("output/benchmark/quality")
GRADED = "graded"  # in place of a seed: seed 0, and no answer is written, so there is no score
# `score` in [0, 1]; `nats` of the reference, a token; `weight` of the candidate that the query is `routed` to
COLUMNS = ("split", "task", "id", "adapter", "score", "nats", "routed", "weight", "variant")


class Single(Routed):
    """The one adapter of a library of one, for every query."""

    def route(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Routing:
        """All weight on the adapter."""
        return Routing(np.tile([1.0, 0.0], (len(queries), 1)))


def method_named(name: str) -> type[Any]:
    """A method of the package, or one of the benchmark's own."""
    return {"single": Single, "per_query": PerQuery}.get(name) or load_method(name)


def answer(library: str, setting: str, method: str, seed: str) -> list[dict[str, Any]]:
    """Answers all parts of a setting; for each part what it cost and, under `answers`, rows of COLUMNS.

    Args:
        seed: a number, or GRADED.
    """
    (labelled,) = (one for one in libraries() if one.name == library)
    base, adapters = load_base(labelled.base), load_library([str(labelled.adapters)])
    return [
        answer_part(part, method, base, part.library(adapters), seed)
        for part in SETTINGS[setting].parts(labelled.rows)
    ]


def answer_part(part: Part, name: str, base: Base, library: list[Adapter], seed: str) -> dict[str, Any]:
    """Answers one part of a setting; see `answer`."""
    graded, number = seed == GRADED, 0 if seed == GRADED else int(seed)
    rows = part.rows.assign(label=part.rows["id"], id=range(len(part.rows)))
    # No longer text than the longest target can be right, so nothing is lost by stopping there.
    longest = max(map(len, base.tokenizer(list(rows["target"]))["input_ids"])) + 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "queries.csv"
        rows.to_csv(file, index=False, quoting=csv.QUOTE_ALL)
        settings = Settings((file,), Path(folder), seed=number, max_gen_len=longest)
        method: Routed = method_named(name)(name, base, library, Context(settings))
        torch.manual_seed(number)
        queries = read_queries(file)
        references = [
            query.choices[int(target)] if query.choices and metric != "none" else reference(metric, target)
            for query, target, metric in zip(queries, rows["target"], rows["metric"], strict=True)
        ]
        put_to_it = with_references(queries, references) if graded else queries

        def work() -> Result:
            with grading(method) if graded else nullcontext():
                return method.answer(put_to_it)

        seconds, result = timed(work)
        decision = result.decision
        assert decision is not None  # every method here routes
        if graded:
            nats = [answer.scores[0] for answer in result.answers]
        else:
            prompts, variants = method.encoded(queries), Path(folder) / VARIANTS
            nats = of_references(method, queries, prompts, references, decision, variants)
    names = [*(adapter.name for adapter in library), BASE_COLUMN]
    weights = decision.routing.weights
    tops = [names[n] for n in weights.argmax(1)]
    asked: Any = rows.itertuples()
    columns = zip(
        asked, result.answers, nats, tops, weights.max(1), decision.clusters.labels.tolist(), strict=True
    )
    return {
        "part": part.name,
        "seconds": round(seconds, 2),
        "stages": {stage: round(value, 2) for stage, value in method.stages.seconds.items()},
        "peak_mib": peak_mib(),
        "threads": torch.get_num_threads(),
        "adapters": len(library),
        "variants": len(decision.variants),
        "answers": [
            [
                row.split,
                row.task,
                row.label,
                row.adapter,
                math.nan if graded else round(score(row.metric, found.text, row.target), 4),
                round(likelihood, 4),
                top,
                round(float(weight), 4),
                variant,
            ]
            for row, found, likelihood, top, weight, variant in columns
        ],
    }
