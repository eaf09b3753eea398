"""`average`: one static merge, the exact mean of all adapters' updates."""

from collections.abc import Sequence

from router.model.answer import Rows
from router.pipeline.result import Routing
from router.pipeline.steps import Method, evenly
from router.queries.submission import Query


class Average(Method):
    """Every query is answered by the mean of all updates, whatever it asks."""

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """The same weight for every adapter, none for the base model."""
        return evenly(queries, self.adapters)
