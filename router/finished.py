"""A finished run, read back from its folder and checked to belong together. Knows no models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from router.constants import BASE_COLUMN
from router.errors import InputError
from router.evidence import Evidence
from router.submission import Query, read_queries, read_rows

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

NEEDED = ("method", "versions", "flags", "seconds", "peak_mib")  # in every run.json


@dataclass(frozen=True)
class QueryFile:
    """One query file's results, row by row in the order of its queries.

    Attributes:
        path: the query file, as the run knew it.
        ids, predictions: what was answered with what.
        queries: what was asked; None where the file, or the query in it, is gone.
        names: the candidates, adapters and then the base model; empty if the method does not route.
        labels: (queries,) number of the variant; empty if the method does not route.
        weights: (queries, candidates).
        evidence: why; None of a method that cannot tell.
    """

    path: Path
    ids: list[str]
    predictions: list[str]
    queries: list[Query | None]
    names: list[str]
    labels: Labels
    weights: Array
    evidence: Evidence | None

    @property
    def heaviest(self) -> list[str | None]:
        """Each query's heaviest candidate; None where several are, as in a static merge, or there is none."""
        tops = [np.flatnonzero(row == row.max(initial=0)) for row in self.weights]
        return [self.names[top[0]] if len(top) == 1 else None for top in tops]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies now, wherever it was written.
        record: what run.json holds.
        files: the query files by their stems, which name their results.
    """

    folder: Path
    record: dict[str, Any]
    files: dict[str, QueryFile]


def load(folder: Path) -> Run:
    """Reads a finished run.

    Raises:
        InputError: files of the run are missing, or do not belong together.
    """
    record = _record(folder / "run.json")
    paths = [Path(name) for name in record["flags"]["dataset_filepaths"]]
    return Run(folder, record, {path.stem: _file(folder, path, record) for path in paths})


def _record(path: Path) -> dict[str, Any]:
    what = f"{path}: expected the record of a finished run"
    if not path.is_file():
        raise InputError(f"{what}, found none; name the output folder of a run")
    try:
        record = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{what}, in JSON ({error}); run it again") from error
    if missing := [key for key in NEEDED if not isinstance(record, dict) or key not in record]:
        raise InputError(f"{what}; {', '.join(missing)} is missing; run it again")
    return dict(record)


def _file(folder: Path, path: Path, record: dict[str, Any]) -> QueryFile:
    answers = _rows(folder / path.name, ("id", "prediction"))
    ids, predictions = ([row[key] for row in answers] for key in ("id", "prediction"))
    try:
        queries = {query.id: query for query in read_queries(path)}
    except InputError:
        queries = {}
    asked = [queries.get(own) for own in ids]
    if "variants" not in record:  # of the starter kit's methods
        return QueryFile(
            path, ids, predictions, asked, [], np.zeros(0, np.int64), np.zeros((len(ids), 0)), None
        )
    names = [*record["adapters"], BASE_COLUMN]
    routing, evidence = (folder / f"{path.stem}.{kind}" for kind in ("routing.csv", "evidence.safetensors"))
    labels, weights = _routing(routing, ids, names, len(record["variants"]))
    return QueryFile(path, ids, predictions, asked, names, labels, weights, _evidence(evidence, ids, names))


def _rows(path: Path, needed: Sequence[str]) -> list[dict[str, str]]:
    if not path.exists():
        raise InputError(f"{path}: expected a CSV file, found none; is the folder whole? Run it again")
    return [row for _, row in read_rows(path, needed)]


def _routing(path: Path, ids: list[str], names: list[str], n_variants: int) -> tuple[Labels, Array]:
    rows = _rows(path, ("id", "variant", *names))
    if [row["id"] for row in rows] != ids:
        raise InputError(f"{path}: expected the ids of the answers beside it; of two runs? Run it again")
    try:
        labels = [int(row["variant"]) for row in rows]
        weights = [[float(row[name]) for name in names] for row in rows]
    except ValueError as error:
        raise InputError(
            f"{path}: expected numbers for variant and weights ({error}); run it again"
        ) from error
    if any(not 0 <= label < n_variants for label in labels):
        raise InputError(f"{path}: its rows name variants that run.json does not; of two runs? Run it again")
    return np.array(labels, np.int64), np.array(weights, np.float64).reshape(len(ids), len(names))


def _evidence(path: Path, ids: list[str], names: list[str]) -> Evidence | None:
    if not path.exists():
        return None
    try:
        evidence = Evidence.load(path)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path}: expected the evidence of a run ({error}); run it again") from error
    if evidence.adapters != names[:-1] or len(evidence.scores) != len(ids):
        raise InputError(
            f"{path}: expected the adapters and queries of the routing table; of two runs? Run it again"
        )
    return evidence
