"""Reads a finished run back from its folder, and checks that its files belong together. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from router.constants import BASE_COLUMN
from router.pipeline.record import RECORD, Record
from router.queries.submission import (
    MULTIPLE_CHOICE,
    Query,
    digest_of,
    read_queries,
    read_rows,
    submission_name,
)
from router.routing.clusters import Clusters
from router.routing.evidence import Evidence, joined
from router.settings import Settings
from router.system.errors import InputError
from router.system.files import sha256_of

Array = NDArray[np.float64]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class QueryFile:
    """One query file's results, row by row in the order of its queries.

    Attributes:
        path: the query file, as the run was given it.
        ids, predictions: each query's id and the answer to it.
        queries: what was asked; None if the file, or the query in it, is gone or has changed.
        names: the candidates, adapters and then the base model; empty if the method does not route.
        labels: (queries,) number of the variant; empty if the method does not route.
        weights: (queries, candidates).
        evidence: why; None if the method keeps none.
    """

    path: Path
    ids: list[str]
    predictions: list[str]
    queries: list[Query | None]
    names: list[str]
    labels: Labels
    weights: Array
    evidence: Evidence | None

    def some(self, rows: Labels) -> QueryFile:
        """The results of some of its queries."""
        ids, predictions, queries = (
            [of[n] for n in rows] for of in (self.ids, self.predictions, self.queries)
        )
        labels = self.labels[rows] if len(self.labels) else self.labels
        evidence = self.evidence and self.evidence.rows(rows)
        return QueryFile(
            self.path, ids, predictions, queries, self.names, labels, self.weights[rows], evidence
        )

    @property
    def top(self) -> list[str | None]:
        """Each query's top candidate; None if several are level, as in a static merge, or there is none."""
        tops = [np.flatnonzero(row == row.max(initial=0)) for row in self.weights]
        return [self.names[top[0]] if len(top) == 1 else None for top in tops]


class Row(NamedTuple):
    """A query with its answer."""

    id: str
    file: int  # which of the run's query files it is in
    text: str | None  # None if it is not at hand
    prediction: str  # for multiple choice, with the text of the choice

    def line(self, most: int) -> str:
        """The start of the text, or of the id if there is none, on one line of at most `most` characters."""
        return cut(" ".join((self.text or self.id).split()), most)


@dataclass(frozen=True)
class Run:
    """A finished run. `files` holds each query file's results; everything else joins them in order.

    Attributes:
        folder: where it is now, wherever it was written.
        record: what run.json holds.
        files: the query files by their stems, which name their results.
    """

    folder: Path
    record: Record
    files: dict[str, QueryFile]

    @property
    def paths(self) -> list[str]:
        """The query files, as the run was given them."""
        return [str(file.path) for file in self.files.values()]

    @property
    def names(self) -> list[str]:
        """The candidates, adapters and then the base model; empty if the method does not route."""
        return next(iter(self.files.values())).names

    @property
    def shown(self) -> list[str]:
        """The candidates' names for a reader."""
        return [*self.names[:-1], "base model"] if self.names else []

    @property
    def settings(self) -> Settings:
        """The settings of the run.

        Raises:
            InputError: run.json lacks one, or has one that this version does not know.
        """
        try:
            return Settings.from_plain(self.record.flags)
        except InputError as error:
            raise InputError(
                f"{self.folder / RECORD}: expected the flags of a run ({error}); run it again"
            ) from error

    def sample(self, most: int) -> Run:
        """The run of at most so many of its queries, in order, among them the first of each variant.

        The same run gives the same sample.
        """
        lengths = [len(file.ids) for file in self.files.values()]
        total = sum(lengths)
        if total <= most:
            return self
        firsts = np.unique(self.labels, return_index=True)[1][:most]
        rest = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(total), firsts))
        chosen = np.sort(np.append(firsts, rest[: most - len(firsts)]))
        starts = np.cumsum([0, *lengths])
        files = {
            stem: file.some(chosen[(chosen >= start) & (chosen < start + length)] - start)
            for (stem, file), start, length in zip(self.files.items(), starts, lengths, strict=False)
        }
        return Run(self.folder, self.record, files)

    @cached_property
    def rows(self) -> list[Row]:
        """All queries with their answers."""
        return [
            Row(own, n, query.input if query else None, _spelt(query, prediction))
            for n, file in enumerate(self.files.values())
            for own, query, prediction in zip(file.ids, file.queries, file.predictions, strict=True)
        ]

    @property
    def keys(self) -> list[str]:
        """`STEM:ID` of each query, as `proto-route explain` takes it."""
        return [f"{stem}:{own}" for stem, file in self.files.items() for own in file.ids]

    @cached_property
    def labels(self) -> Labels:
        """(queries,) the variant of each; empty if the method does not route."""
        return np.concatenate([file.labels for file in self.files.values()])

    @cached_property
    def weights(self) -> Array:
        """(queries, candidates)."""
        return np.concatenate([file.weights for file in self.files.values()])

    @cached_property
    def evidence(self) -> Evidence | None:
        """The evidence of all queries, None if a file has none."""
        found = [file.evidence for file in self.files.values() if file.evidence]
        return joined(found) if len(found) == len(self.files) else None

    @property
    def clusters(self) -> Clusters:
        """The variants, with the weights that each was made with."""
        made = [[variant.weights.get(name, 0) for name in self.names] for variant in self.record.variants]
        return Clusters(self.labels, np.array(made, np.float64))

    @property
    def routes(self) -> bool:
        """Whether different queries may get different weights."""
        alike = not self.names or np.ptp(self.weights, axis=0).max() <= 1e-6
        return self.evidence is not None or not alike

    @property
    def low_margin(self) -> NDArray[np.bool_]:
        """(queries,) whether the margin is low; False for all if there is no evidence."""
        return np.zeros(len(self.weights), bool) if self.evidence is None else self.evidence.low_margin

    @property
    def sent(self) -> dict[str, int]:
        """How many queries would go to an adapter, by the rate of false alarms; empty without evidence."""
        return {} if self.evidence is None else self.evidence.sent

    @property
    def duplicates(self) -> dict[str, str]:
        """The duplicates, each with its representative: the same adapter in another size."""
        return {} if self.evidence is None else self.evidence.duplicates

    @property
    def lookalikes(self) -> dict[str, str]:
        """Those that read what another adapter reads and write something else, each with that one."""
        return {} if self.evidence is None else self.evidence.lookalikes

    @property
    def silent(self) -> list[str]:
        """Those that read directions which text hardly has."""
        return [] if self.evidence is None else self.evidence.silent

    @property
    def notes(self) -> list[str]:
        """What is missing, in sentences for the reader."""
        cut = [f"An adapter was left out: {reason}." for reason in self.record.left_out]
        if limit := self.record.time_limit:
            cut.append(f"{str(limit).capitalize()}.")
        return cut + [
            f"The texts of {missing} queries of {file.path} are not at hand: the file is gone or has "
            "changed. These queries are shown by their ids alone."
            for file in self.files.values()
            if (missing := file.queries.count(None))
        ]


def cut(text: str, limit: int) -> str:
    """The text, shortened to at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _spelt(query: Query | None, prediction: str) -> str:
    choices = query.choices if query and query.eval_type == MULTIPLE_CHOICE else ()
    return {str(n): f"{n}: {choice}" for n, choice in enumerate(choices)}.get(prediction, prediction)


def load(folder: Path) -> Run:
    """Reads a finished run.

    Raises:
        InputError: files of the run are missing, or do not belong together.
    """
    try:
        return _load(folder)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # such as a name that no file can have
        raise InputError(f"{folder}: expected the files of a finished run ({error}); run it again") from error


def _load(folder: Path) -> Run:
    record = _record(folder / RECORD)
    for name, digest in record.files.items():
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name}: expected the file that run.json lists, found none; is the folder whole? "
                "Run it again"
            )
        if sha256_of(folder / name) != digest:
            raise InputError(
                f"{folder / name}: expected the file that the run in run.json wrote, got another; was it "
                "changed, or a run killed? Run it again"
            )
    if not record.paths:
        raise InputError(f"{folder / RECORD}: expected the names of query files, found none; run it again")
    return Run(folder, record, {path.stem: _file(folder, path, record) for path in record.paths})


def _record(path: Path) -> Record:
    what = f"{path}: expected the record of a finished run"
    try:
        return Record.read(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{what}, found none; name the output folder of a run") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{what}, in JSON ({error}); run it again") from error


def _file(folder: Path, path: Path, record: Record) -> QueryFile:
    if not (answers := list(_rows(folder / submission_name(path), ("id", "prediction")))):
        raise InputError(
            f"{folder / submission_name(path)}: expected at least one answer, found none; run it again"
        )
    ids, predictions = ([row[key] for row in answers] for key in ("id", "prediction"))
    if len(set(ids)) < len(ids):
        raise InputError(
            f"{folder / submission_name(path)}: expected each id once, got some twice; run it again"
        )
    try:
        found = read_queries(path)
        changed = digest_of(found) != record.queries.get(path.name, digest_of(found))
        queries = {} if changed else {query.id: query for query in found}
    except InputError:
        queries = {}
    asked = [queries.get(own) for own in ids]
    if not record.variants:  # a starter-kit method does not route
        return QueryFile(
            path, ids, predictions, asked, [], np.zeros(0, np.int64), np.zeros((len(ids), 0)), None
        )
    names = [*record.adapters, BASE_COLUMN]
    routing, evidence = (folder / f"{path.stem}.{kind}" for kind in ("routing.csv", "evidence.safetensors"))
    labels, weights = _routing(routing, ids, names, len(record.variants))
    return QueryFile(path, ids, predictions, asked, names, labels, weights, _evidence(evidence, ids, names))


def _rows(path: Path, needed: Sequence[str]) -> Iterator[dict[str, str]]:
    if not path.exists():
        raise InputError(f"{path}: expected a CSV file, found none; is the folder whole? Run it again")
    return (row for _, row in read_rows(path, needed))


def _routing(path: Path, ids: list[str], names: list[str], n_variants: int) -> tuple[Labels, Array]:
    found, labels, weights = list[str](), list[int](), list[Array]()
    for row in _rows(path, ("id", "variant", *names)):
        found.append(row["id"])
        try:
            labels.append(int(row["variant"]))
            weights.append(np.array([float(row[name]) for name in names]))
        except (ValueError, OverflowError) as error:
            raise InputError(
                f"{path}: expected numbers for variant and weights ({error}); run it again"
            ) from error
    if found != ids:
        raise InputError(f"{path}: expected the ids of the answers beside it; of two runs? Run it again")
    if any(not 0 <= label < n_variants for label in labels):
        raise InputError(f"{path}: its rows name variants that run.json does not; of two runs? Run it again")
    table = np.array(weights, np.float64).reshape(len(ids), len(names))
    if not ((table >= 0) & (table <= 1)).all():
        raise InputError(f"{path}: expected weights from 0 to 1, got others; run it again")
    return np.array(labels, np.int64), table


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
