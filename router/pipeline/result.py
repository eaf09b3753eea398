"""The result of a method: the answers and, if it routes, how every query was decided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from router.library.adapters import Adapter
from router.model.answer import Answer
from router.model.base import Base
from router.pipeline.evidence import Evidence
from router.pipeline.evidence import joined as together
from router.routing.clusters import Array, Clusters
from router.routing.variants import Variant


class Routing(NamedTuple):
    """The weights of queries, and why."""

    weights: Array  # (queries, adapters + 1) float64; rows sum to 1, the last column is the base model
    evidence: Evidence | None = None  # None if the method keeps none

    def rows(self, rows: NDArray[np.int64]) -> Routing:
        """The routing of some of the queries."""
        return Routing(self.weights[rows], self.evidence and self.evidence.rows(rows))


def joined(parts: Sequence[Routing]) -> Routing:
    """The routing of several parts of the queries, each with its evidence, as one."""
    evidence = [part.evidence for part in parts if part.evidence]
    return Routing(np.concatenate([part.weights for part in parts]), together(evidence))


@dataclass(frozen=True)
class Decision:
    """How queries were routed, and what answered them.

    Attributes:
        base, adapters: the base model and the library.
        routing: the weights of the queries, and why.
        clusters: which variant answered each query.
        variants: what each variant was made of.
        folders: the name of each variant's PEFT folder, None where nothing was written.
    """

    base: Base
    adapters: Sequence[Adapter]
    routing: Routing
    clusters: Clusters
    variants: list[Variant]
    folders: list[str | None]


@dataclass(frozen=True)
class Result:
    """Answers, in the order of the queries.

    Attributes:
        answers: one per query.
        decision: how the queries were routed; None for a starter-kit method, which does not route.
    """

    answers: list[Answer]
    decision: Decision | None = None
