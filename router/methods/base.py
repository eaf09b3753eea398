"""`base`: the base model without any adapter."""

from collections.abc import Sequence

import numpy as np

from router.model.answer import Rows
from router.pipeline.result import Routing
from router.pipeline.steps import Method
from router.queries.submission import Query


class BaseOnly(Method):
    """Every query goes to the base model."""

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """Weight 1 for the base model."""
        weights = np.zeros((len(queries), len(self.adapters) + 1))
        weights[:, -1] = 1.0
        return Routing(weights)
