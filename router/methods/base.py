"""`base`: the base model without any adapter."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router.clusters import Array
from router.merges import Routed
from router.submission import Query


class BaseOnly(Routed):
    """Every query goes to the base model."""

    def route(self, queries: Sequence[Query]) -> Array:
        """Weight 1 for the base model."""
        weights = np.zeros((len(queries), len(self.adapters) + 1))
        weights[:, -1] = 1.0
        return weights
