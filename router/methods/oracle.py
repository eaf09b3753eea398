"""`oracle`: each query goes to its own task's adapter. Reads labels, so it is for tables only."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from router.constants import BASE_COLUMN
from router.library.adapters import Adapter
from router.model.answer import Rows
from router.pipeline.result import Routing
from router.pipeline.steps import Method
from router.queries.submission import Query, adapters_of, read_labels, read_queries
from router.settings import Settings
from router.system.errors import InputError


class Oracle(Method):
    """The best that routing could do: the column `adapter` of the query file names the adapter.

    A query that needs several, as `a+b`, goes to their average, each of the same weight.
    """

    @classmethod
    def reads(cls, adapters: Sequence[Adapter], settings: Settings) -> list[Path]:
        """The labels."""
        return list(settings.dataset_filepaths)

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """Weight 1 for the labelled adapter, or equal shares for several.

        Raises:
            InputError: a query file has no labels, a label names no adapter of the library, a query has two
                labels, or the queries are others than those of the query files.
        """
        if list(queries) != [row for path in self.settings.dataset_filepaths for row in read_queries(path)]:
            raise InputError(
                "-m oracle: expected the queries of --dataset_filepaths, whose labels it reads, got others"
            )
        names = [*(adapter.name for adapter in self.adapters), BASE_COLUMN]
        weights = np.zeros((len(queries), len(names)))
        labels = (
            (path, line, label)
            for path in self.settings.dataset_filepaths
            for line, label in read_labels(path, "adapter")
        )
        known: dict[Query, str] = {}  # the same query has one answer
        for n, (path, line, label) in enumerate(labels):
            if (other := known.setdefault(queries[n], label)) != label:
                raise InputError(
                    f"{path}, line {line}, column adapter: expected {other!r}, which the same query has in "
                    f"another file, got {label!r}; answer the files in two runs"
                )
            needed = adapters_of(label, names)
            for name in needed:
                if name not in names:
                    raise InputError(
                        f"{path}, line {line}, column adapter: {name!r} is not in the library; "
                        "add it to --adapters"
                    )
                weights[n, names.index(name)] += 1 / len(needed)
        return Routing(weights)
