"""`oracle`: each query goes to its own task's adapter. Reads labels, so it is for tables only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from router.clusters import Array
from router.constants import BASE_COLUMN
from router.errors import InputError
from router.merges import Routed
from router.submission import Query, read_rows


class Oracle(Routed):
    """What routing could reach at best: the column `adapter` of the query file says where to."""

    def route(self, queries: Sequence[Query]) -> Array:
        """Weight 1 for the labelled adapter.

        Raises:
            InputError: a query file has no labels, or one names no adapter of the library.
        """
        names = [*(adapter.name for adapter in self.adapters), BASE_COLUMN]
        weights = np.zeros((len(queries), len(names)))
        rows = (
            (path, line, row["adapter"])
            for path in self.settings.dataset_filepaths
            for line, row in read_rows(path, ("adapter",))
        )
        for n, (path, line, label) in enumerate(rows):
            if label not in names:
                raise InputError(
                    f"{path}, line {line}, column adapter: {label!r} is not in the library; "
                    "add it to --adapters"
                )
            weights[n, names.index(label)] = 1.0
        return weights
