"""Reads a finished run back from its folder, and checks that its files belong together. Knows no models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from router.constants import BASE_COLUMN, FORMAT
from router.pipeline.evidence import Evidence, joined
from router.pipeline.record import RECORD, RESUMED, Record
from router.queries.submission import Query, digest_of, read_queries, read_rows, submission_name
from router.routing.clusters import Array, Clusters, mixes
from router.settings import Settings
from router.system.errors import InputError
from router.system.files import is_still

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Run:
    """A finished run, query by query in the order of its query files.

    Attributes:
        folder: where it is now, wherever it was written.
        record: what run.json holds.
        file: (queries,) the number of the query file that each is in.
        ids, predictions: each query's id and the answer to it.
        queries: what was asked; None if the file, or the query in it, is gone or has changed.
        names: the candidates, adapters and then the base model; empty if the method does not route.
        weights: (queries, candidates).
        clusters: the variants, with the weights that each was made with; if the method does not route, none.
        evidence: why; None if the method keeps none.
    """

    folder: Path
    record: Record
    file: Labels
    ids: list[str]
    predictions: list[str]
    queries: list[Query | None]
    names: list[str]
    weights: Array
    clusters: Clusters
    evidence: Evidence | None

    @property
    def labels(self) -> Labels:
        """(queries,) number of the variant; zeros if the method does not route."""
        return self.clusters.labels

    @property
    def stems(self) -> list[str]:
        """The query files' names without their endings, which name their results."""
        return [path.stem for path in self.record.paths]

    @property
    def keys(self) -> list[str]:
        """`STEM:ID` of each query, as `proto-route explain` takes it."""
        stems = self.stems
        return [f"{stems[number]}:{id_}" for number, id_ in zip(self.file, self.ids, strict=True)]

    @property
    def answers(self) -> list[str]:
        """The predictions; for multiple choice with the text of the choice."""
        pairs = zip(self.queries, self.predictions, strict=True)
        return [spelt(query.choices if query else ()).get(said, said) for query, said in pairs]

    def line(self, n: int, most: int) -> str:
        """The start of a query's text, or of its id if there is none, in at most `most` characters."""
        query = self.queries[n]
        return cut(" ".join((query.input if query else self.ids[n]).split()), most)

    @property
    def shown(self) -> list[str]:
        """The candidates' names for a reader."""
        return [*self.names[:-1], "base model"] if self.names else []

    @property
    def routes(self) -> bool:
        """Whether different queries may get different weights."""
        alike = not self.names or np.ptp(self.weights, axis=0).max() <= 1e-6
        return self.evidence is not None or not alike

    @property
    def mixes(self) -> Array:
        """(queries, candidates) what each query was to be answered with."""
        return mixes(self.weights, sharp=self.evidence is not None)  # which proto_route alone keeps

    @property
    def settings(self) -> Settings:
        """The settings of the run.

        Raises:
            InputError: run.json lacks one, or has one that this version does not know.
        """
        with _refused(self.folder / RECORD):
            return Settings.from_plain(self.record.flags)

    def rows(self, chosen: Sequence[int]) -> Run:
        """The run of some of its queries, by their numbers."""
        part = np.array(chosen)
        return replace(
            self,
            file=self.file[part],
            ids=[self.ids[n] for n in chosen],
            predictions=[self.predictions[n] for n in chosen],
            queries=[self.queries[n] for n in chosen],
            weights=self.weights[part],
            clusters=replace(self.clusters, labels=self.labels[part]),
            evidence=self.evidence and self.evidence.rows(part),
        )

    def sample(self, most: int) -> Run:
        """The run of at most `most` of its queries, in order, among them the first of each variant.

        The same run gives the same sample.
        """
        firsts = np.unique(self.labels, return_index=True)[1][:most]
        rest = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(self.ids)), firsts))
        return self.rows(sorted([*firsts.tolist(), *rest[: most - len(firsts)].tolist()]))

    @property
    def notes(self) -> list[str]:
        """The parts that are missing, in sentences for the reader."""
        notes = [f"An adapter was left out: {reason}." for reason in self.record.left_out]
        if limit := self.record.time_limit:
            notes.append(f"{str(limit).capitalize()}.")
        if self.record.resumed:
            notes.append(f"{RESUMED.capitalize()}.")
        gone = self.file[[query is None for query in self.queries]]
        return notes + [
            f"The texts of {missing} queries of {self.record.located(str(path))} are not at hand: the file "
            "is gone or has changed. These queries are shown by their ids alone."
            for number, path in enumerate(self.record.paths)
            if (missing := int((gone == number).sum()))
        ]


def cut(text: str, limit: int) -> str:
    """The text, shortened to at most `limit` characters."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def spelt(choices: Sequence[str]) -> dict[str, str]:
    """For a reader: each choice behind its number, by that number, which a prediction is."""
    return {str(n): f"{n}: {choice}" for n, choice in enumerate(choices)}


def load(folder: Path) -> Run:
    """Reads a finished run.

    Raises:
        InputError: files of the run are missing, or do not belong together.
    """
    with _refused(folder / RECORD):
        record = Record.read(folder / RECORD)
        if record.format != FORMAT:
            raise ValueError(f"it is of format {record.format}, and this version reads {FORMAT}")
    for name, digest in record.files.items():
        with _refused(folder / name):
            if not is_still(folder / name, digest):
                raise ValueError("it is not the one that run.json lists")
    names = [*record.adapters, BASE_COLUMN] if record.variants else []  # a starter-kit method does not route
    file, answers, queries = list[int](), list[tuple[str, str]](), list[Query | None]()
    tables, evidence = list[tuple[Labels, Array]](), list[Evidence]()
    for number, path in enumerate(record.paths):
        with _refused(folder / submission_name(path)) as submission:
            part = _answers(submission)
        with _refused(folder / f"{path.stem}.routing.csv") as table:
            tables.append(_routing(table, list(part), names, record))
        with _refused(folder / f"{path.stem}.evidence.safetensors") as kept:
            if names and kept.exists():
                why = Evidence.load(kept)
                if why.adapters != names[:-1] or len(why.scores) != len(part):
                    raise ValueError("its adapters or queries are not those of the routing table")
                evidence.append(why)
        file += [number] * len(part)
        answers += part.items()
        queries += _asked(Path(record.located(str(path))), list(part), record)
    ids, predictions = ([pair[n] for pair in answers] for n in (0, 1))
    labels, weights = (np.concatenate([table[n] for table in tables]) for n in (0, 1))
    made = [[variant.weights.get(name, 0) for name in names] for variant in record.variants]
    clusters = Clusters(labels, np.array(made, np.float64))
    with _refused(folder):
        whole = joined(evidence) if len(evidence) == len(tables) else None
    return Run(folder, record, np.array(file), ids, predictions, queries, names, weights, clusters, whole)


@contextmanager
def _refused(path: Path) -> Iterator[Path]:
    """Names the file in which the block meets something else than a run wrote there."""
    try:
        yield path
    except (OSError, ValueError, KeyError, TypeError, OverflowError, SafetensorError) as error:
        why = (isinstance(error, OSError) and error.strerror) or error
        raise InputError(
            f"{path}: expected a file of a finished run, whole and unchanged ({why}); name a run's output "
            "folder, or run it again"
        ) from error


def _check_file(path: Path) -> None:
    if not path.is_file():  # a pipe would wait for ever
        raise ValueError("it is no file")


def _answers(path: Path) -> dict[str, str]:
    """The answers by their queries' ids."""
    _check_file(path)
    rows = [(row["id"], row["prediction"]) for _, row in read_rows(path, ("id", "prediction"))]
    if not rows or len(answers := dict(rows)) < len(rows):
        raise ValueError("it has no answers, or two of one query")
    return answers


def _asked(path: Path, ids: list[str], record: Record) -> list[Query | None]:
    """The query of each id, None where it is not at hand any more."""
    try:
        asked = read_queries(path) if path.is_file() else []  # a pipe or a device would give no end
    except (InputError, OSError):  # the latter of a folder that others may not read
        asked = []
    digest = record.queries.get(path.name)
    known = digest is None or digest == digest_of(asked)
    queries = {query.id: query for query in asked} if known else {}
    return [queries.get(id_) for id_ in ids]


def _routing(path: Path, ids: list[str], names: list[str], record: Record) -> tuple[Labels, Array]:
    """The variant of each query, and its weights."""
    if not names:
        return np.zeros(len(ids), np.int64), np.zeros((len(ids), 0))
    _check_file(path)
    rows = [row for _, row in read_rows(path, ("id", "variant", *names))]
    labels = np.array([int(row["variant"]) for row in rows], np.int64)
    weights = np.array([[float(row[name]) for name in names] for row in rows], np.float64)
    if [row["id"] for row in rows] != ids or not np.isin(labels, range(len(record.variants))).all():
        raise ValueError("its ids are not those of the answers, or its variants not those of run.json")
    if not ((weights >= 0) & (weights < 1.01)).all():  # a method of one's own may round
        raise ValueError("a weight is not from 0 to 1")
    return labels, weights
