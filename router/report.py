"""A finished run as one HTML file that needs nothing else: `python -m router.report DIR`.

Reads what router/run.py left in the folder, and the query files for their texts; loads no model and no
adapter. Queries, answers and names are hostile text: the template escapes all of them, and what the page's
script shows comes as JSON that cannot end its block.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from router.constants import BASE_COLUMN
from router.errors import InputError
from router.submission import MULTIPLE_CHOICE, Query, read_queries, read_rows, replacing

if TYPE_CHECKING:
    from router.evidence import Evidence

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

REPORT = "report.html"
MAPPED = 2_000  # queries that the map is fitted to; the rest are placed among them
LISTED = 10_000  # queries in the map and the table
EXPLAINED = 12  # adapters whose numbers are kept for each query
VARIANTS = 100  # in the heat map and the table of variants
TEXT_BYTES = 6_000_000  # of all texts in the file
LIMITS = range(20, 2_001, 20)  # characters of a text; the most that fit
SHORT = 110  # characters of a query where it only stands for its kind
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # within a block
BARS = 6  # heaviest weights kept of each query


@dataclass(frozen=True)
class Row:
    """A query with its answer; the text is None if the query file is gone."""

    id: str
    file: int
    text: str | None
    prediction: str


@dataclass(frozen=True)
class Run:
    """A finished run, all query files one after the other.

    Attributes:
        record: what run.json holds.
        files: the query files, as the run was given them.
        names: the candidates, adapters and then the base model; empty if the method does not route.
        rows: the queries.
        labels: (queries,) variant of each; empty if the method does not route.
        weights: (queries, candidates).
        evidence: of all queries, None if a file has none.
        notes: what a reader should know is missing.
    """

    record: dict[str, Any]
    files: list[str]
    names: list[str]
    rows: list[Row]
    labels: Labels
    weights: Array
    evidence: Evidence | None
    notes: list[str]

    @property
    def shown(self) -> list[str]:
        """The candidates as a reader knows them."""
        return [*self.names[:-1], "base model"] if self.names else []

    @property
    def routes(self) -> bool:
        """Whether queries were told apart."""
        alike = not self.names or np.ptp(self.weights, axis=0).max() <= 1e-6
        return self.evidence is not None or not alike

    @property
    def guesses(self) -> NDArray[np.bool_]:
        """(queries,) no candidate has more than half of the weight; counted where there is evidence."""
        if self.evidence is None:
            return np.zeros(len(self.rows), dtype=bool)
        return np.asarray(self.weights.max(1) <= 0.5)


def write_report(folder: Path) -> Path:
    """Makes `report.html` from the files of a finished run and returns its path.

    Raises:
        InputError: files of the run are missing, or do not belong together.
    """
    html = render(load(folder))
    with replacing(folder / REPORT) as file:
        file.write(html)
    return folder / REPORT


# The run's files


def load(folder: Path) -> Run:
    """Reads the files of a finished run.

    Raises:
        InputError: files of the run are missing, or do not belong together.
    """
    record = _record(folder)
    names = [*record["adapters"], BASE_COLUMN] if "adapters" in record else []
    files = [str(path) for path in record["flags"]["dataset_filepaths"]]
    rows: list[Row] = []
    labels: list[int] = []
    weights: list[list[float]] = []
    evidence: list[Evidence | None] = []
    notes: list[str] = []
    for number, path in enumerate(map(Path, files)):
        part = _answers(folder / path.name, number, _texts(path, notes), notes)
        rows += part
        if names:
            _routing(folder / f"{path.stem}.routing.csv", part, names, labels, weights)
            evidence.append(_evidence(folder / f"{path.stem}.evidence.safetensors", part, names))
    n_variants = len(record.get("variants", []))
    if labels and not 0 <= min(labels) <= max(labels) < n_variants:
        raise InputError(f"{folder}: the routing tables name variants that run.json does not; of two runs?")
    return Run(
        record, files, names, rows, np.array(labels, dtype=np.int64), np.array(weights, dtype=np.float64),
        _joined(evidence), notes,
    )  # fmt: skip


def _record(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: expected the record of a finished run, found none") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected the record of a finished run, in JSON ({error})") from error
    needed = ("method", "versions", "flags", "seconds", "peak_mib")
    if not isinstance(record, dict) or (missing := [key for key in needed if key not in record]):
        what = ", ".join(missing) if isinstance(record, dict) else "everything"
        raise InputError(f"{path}: expected the record of a finished run; {what} is missing")
    return record


def _texts(path: Path, notes: list[str]) -> dict[str, Query]:
    """The queries of a file by id; none, and a note, where it can no longer be read."""
    try:
        return {query.id: query for query in read_queries(path)}
    except InputError as error:
        gone = "is no longer there" if not path.exists() else f"can no longer be read ({error})"
        notes.append(f"The query file {path} {gone}, so its queries are shown by their ids alone.")
        return {}


def _answers(path: Path, number: int, queries: Mapping[str, Query], notes: list[str]) -> list[Row]:
    rows = [row for _, row in read_rows(path, ("id", "prediction"))]
    if queries and (missing := sum(row["id"] not in queries for row in rows)):
        notes.append(f"{missing} queries of {path.name} are not in the query file that is there now.")
    return [
        Row(row["id"], number, query.input if query else None, _spelt(query, row["prediction"]))
        for row in rows
        for query in [queries.get(row["id"])]
    ]


def _spelt(query: Query | None, prediction: str) -> str:
    """The prediction; of a multiple choice with the text of the choice whose number it is."""
    if query is None or query.eval_type != MULTIPLE_CHOICE or not re.fullmatch("[0-9]{1,6}", prediction):
        return prediction
    number = int(prediction)
    return f"{number}: {query.choices[number]}" if number < len(query.choices) else prediction


def _routing(
    path: Path, part: Sequence[Row], names: Sequence[str], labels: list[int], weights: list[list[float]]
) -> None:
    """Adds the file's variants and weights to those of the files before."""
    rows = [row for _, row in read_rows(path, ("id", "variant", *names))]
    if [row["id"] for row in rows] != [row.id for row in part]:
        raise InputError(f"{path}: expected the ids of the answers beside it; of two runs?")
    try:
        labels += [int(row["variant"]) for row in rows]
        weights += [[float(row[name]) for name in names] for row in rows]
    except ValueError as error:
        raise InputError(f"{path}: expected numbers for variant and weights ({error})") from error


def _evidence(path: Path, part: Sequence[Row], names: Sequence[str]) -> Evidence | None:
    from safetensors import SafetensorError

    from router.evidence import Evidence

    if not path.exists():
        return None
    try:
        evidence = Evidence.load(path)
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise InputError(f"{path}: expected the evidence of a run ({error})") from error
    if evidence.adapters != names[:-1] or len(evidence.scores) != len(part):
        raise InputError(f"{path}: expected the adapters and queries of the routing table; of two runs?")
    return evidence


def _joined(parts: Sequence[Evidence | None]) -> Evidence | None:
    """The evidence of all files as one, None if a file has none."""
    from router.evidence import Evidence

    found = [part for part in parts if part is not None]
    if not found or len(found) < len(parts):
        return None
    first = found[0]
    arrays = {
        name: np.concatenate([getattr(part, name) for part in found])
        for name in vars(first)
        if name not in ("adapters", "modules")
    }
    return Evidence(first.adapters, first.modules, **arrays)


# The map


def gate_space(run: Run) -> tuple[Array, list[int]]:
    """Directions of the queries, (queries, d), and which candidate each of the d axes belongs to.

    With evidence an axis is the candidate's score as far as it stands out from generic text: the adapters'
    before trials, and the base model's level. Without evidence it is the weight.
    """
    if run.evidence is None:
        axes = np.flatnonzero(run.weights.any(0)).tolist()
        return run.weights[:, axes], axes
    points = np.column_stack([run.evidence.scores, run.evidence.candidates[:, -1]]).astype(np.float64)
    axes = np.flatnonzero(np.isfinite(points).all(0)).tolist()  # a copy of another adapter has no score
    return points[:, axes].clip(0), axes


def layout(points: Array) -> tuple[Array, Array, str]:
    """Places in the unit square of queries and of the axes' own directions, by t-SNE on cosines.

    An adapter's prototype is the direction of its own axis. Beyond MAPPED queries a sample is fitted, and
    the others lie where the most similar of the sample do. The same points give the same places.

    Returns:
        (queries, 2), (axes, 2), and a sentence on how it was made.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    n, axes = points.shape
    chosen = np.arange(n)
    if n > MAPPED:
        chosen = np.sort(np.random.default_rng(0).choice(n, MAPPED, replace=False))
    fitted = _unit(np.vstack([points[chosen], np.eye(axes)]))
    with threadpool_limits(1):  # sums over threads come in any order, and t-SNE enlarges the difference
        flat, how = _flat(fitted)
        places = flat[: len(chosen)]
        if n > MAPPED:
            how += f" of a sample of {MAPPED:,}; the others lie by those that are most like them"
            places = _among(_unit(points), chosen, fitted[: len(chosen)], places)
    both = _square(np.vstack([places, flat[len(chosen) :]]))
    if n <= MAPPED:
        both = _square(_apart(both, min(0.016, 0.35 / len(both) ** 0.5)))
    return both[:n], both[n:], how


def _square(places: Array) -> Array:
    """Stretched to the unit square."""
    low, span = places.min(0), np.ptp(places, axis=0)
    return np.asarray((places - low) / np.where(span > 0, span, 1))


def _apart(places: Array, distance: float) -> Array:
    """Places moved as little as keeps most of them a distance apart, so that marks do not hide each other."""
    from scipy.spatial import cKDTree

    # Places that coincide part in all directions.
    k = np.arange(len(places))
    start = 0.2 * distance * np.sqrt(k % 97 / 97)[:, None]
    places = places + start * np.column_stack([np.cos(2.4 * k), np.sin(2.4 * k)])
    for _ in range(80):
        pairs = cKDTree(places).query_pairs(distance, output_type="ndarray")
        if not len(pairs):
            break
        one, other = pairs[np.lexsort(pairs.T)].T
        gap = places[one] - places[other]
        length = np.linalg.norm(gap, axis=1, keepdims=True)
        push = gap * ((distance - length) / length.clip(1e-9) / 3)
        np.add.at(places, one, push)
        np.add.at(places, other, -push)
    return places


def _unit(points: Array) -> Array:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(lengths > 0, lengths, 1))


def _flat(points: Array) -> tuple[Array, str]:
    from sklearn.manifold import TSNE

    if len(points) < 12 or points.shape[1] < 2:  # too few for neighbourhoods
        return _principal(points), "principal components"
    # As many neighbours as a candidate has queries, more or less.
    perplexity = min(max(8.0, len(points) / points.shape[1]), 30.0, (len(points) - 1) / 3)
    tsne = TSNE(metric="cosine", init="pca", learning_rate="auto", perplexity=perplexity, random_state=0)
    return np.asarray(tsne.fit_transform(points), dtype=np.float64), "t-SNE on cosines"


def _principal(points: Array) -> Array:
    """The first two principal components, (n, 2), each with its largest value positive."""
    centred = points - points.mean(0)
    found = np.linalg.svd(centred, full_matrices=False)[2][:2]
    flat = np.zeros((len(points), 2))
    flat[:, : len(found)] = centred @ found.T
    signs = np.sign(np.take_along_axis(flat, np.abs(flat).argmax(0)[None], 0))
    return np.asarray(flat * np.where(signs == 0, 1, signs))


def _among(points: Array, chosen: Labels, sample: Array, places: Array) -> Array:
    """Places of all points: the sample's own, and the mean of those of the 3 most similar in it."""
    from sklearn.neighbors import NearestNeighbors

    nearest = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(sample).kneighbors(points)[1]
    out: Array = places[nearest].mean(1)
    out[chosen] = places
    return out


# What the page shows


def headline(run: Run) -> dict[str, Any]:
    """The numbers of the first sentences."""
    record = run.record
    heaviest = np.bincount(run.weights.argmax(1), minlength=len(run.names)) if run.names else np.zeros(0)
    return {
        "queries": len(run.rows),
        "method": record["method"],
        "files": run.files,
        "adapters": max(0, len(run.names) - 1),
        "variants": len(record.get("variants", [])),
        "base": record.get("base", {}).get("name"),
        "guesses": int(run.guesses.sum()),
        "seconds": sum(record["seconds"].values()),
        "peak_mib": max(record["peak_mib"].values(), default=0),
        "to_base": int(heaviest[-1]) if run.names else 0,
        "median": float(np.median(run.weights.max(1))) if run.names else None,
        "cohesion": float(1 - _distances(run).mean()) if run.names else None,
        "unused": [name for name, count in zip(run.names[:-1], heaviest[:-1], strict=True) if not count],
    }


def variants(run: Run, listed: Mapping[int, int]) -> list[dict[str, Any]]:
    """The variants that answered most queries, most first.

    Args:
        listed: position in the table of queries, by number of the query.
    """
    own, apart = variant_weights(run), _distances(run)
    counts = np.bincount(run.labels, minlength=len(own))
    found = []
    for n in np.argsort(-counts, kind="stable")[:VARIANTS].tolist():
        members = np.flatnonzero(run.labels == n)
        members = members[np.argsort(apart[members], kind="stable")]
        heaviest = np.argsort(-own[n], kind="stable")[:3].tolist()
        found.append(
            {
                "number": n,
                "queries": int(counts[n]),
                "weights": own[n].tolist(),
                "heaviest": [(run.shown[k], float(own[n, k])) for k in heaviest if own[n, k] > 0],
                "cohesion": float(1 - apart[members].mean()) if len(members) else None,
                "typical": [_short(run, k, listed) for k in members[:3].tolist()],
                "edge": [_short(run, k, listed) for k in members[3:][-3:][::-1].tolist()],
                "folder": run.record["variants"][n]["folder"],
            }
        )
    return found


def variant_weights(run: Run) -> Array:
    """(variants, candidates) weights with which each variant was made."""
    return np.array(
        [[float(row["weights"].get(name, 0)) for name in run.names] for row in run.record["variants"]]
    )


def _distances(run: Run) -> Array:
    """(queries,) total variation distance of each query's weights to its variant's."""
    return np.asarray(np.abs(run.weights - variant_weights(run)[run.labels]).sum(1) / 2)


def _short(run: Run, number: int, listed: Mapping[int, int]) -> dict[str, Any]:
    row = run.rows[number]
    text = row.id if row.text is None else " ".join(row.text.split())
    return {"id": _cut(row.id, SHORT), "text": _cut(text, SHORT), "place": listed.get(number)}


def heat(run: Run, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Variants by candidates, in the order of the candidates, so that it runs along the diagonal."""

    def order(row: Mapping[str, Any]) -> tuple[int, float]:
        best = int(np.argmax(row["weights"]))
        return best, -row["weights"][best]

    used = [k for k in range(len(run.names)) if any(row["weights"][k] >= 0.005 for row in rows)]
    return {
        "columns": [run.shown[k] for k in used],
        "left_out": len(run.names) - len(used),
        "rows": [
            {"number": row["number"], "queries": row["queries"], "cells": [row["weights"][k] for k in used]}
            for row in sorted(rows, key=order)
        ],
    }


def place_of(module: str) -> tuple[str, str, str]:
    """What stands before the layer's number, the number, and the kind of module; of any name."""
    found = re.match(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?$", module)
    if not found:
        return "", "", module
    kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", found[3] or "")  # experts, say, of one layer count together
    return found[1] or "", found[2], kind


def layers(run: Run) -> dict[str, Any] | None:
    """Mean votes by layer and kind of module, over all queries and over those of each adapter."""
    evidence = run.evidence
    if evidence is None or not evidence.modules:
        return None
    parts = [place_of(module) for module in evidence.modules]
    several = len({before for before, _, _ in parts}) > 1
    spots = [(number, f"{before}: {kind}" if several else kind) for before, number, kind in parts]
    kinds = _sorted_kinds(kind for _, kind in spots)
    numbers = sorted({number for number, _ in spots}, key=lambda number: (number != "", int(number or 0)))
    where = np.array([kinds.index(kind) * len(numbers) + numbers.index(number) for number, kind in spots])
    best = np.where(np.isnan(evidence.scores), -np.inf, evidence.scores).argmax(1)
    groups = [("all queries", len(best), _cells(evidence.votes, where, len(kinds), len(numbers)))]
    for n, name in enumerate(evidence.adapters):
        if (mine := best == n).any():
            cells = _cells(evidence.votes[mine], where, len(kinds), len(numbers))
            groups.append((name, int(mine.sum()), cells))
    return {
        "kinds": kinds,
        "numbers": numbers,
        "groups": [
            {"name": name, "queries": count, "cells": _plain(cells.round(2))} for name, count, cells in groups
        ],
        "strongest": _strongest(groups[0][2], kinds, numbers),
    }


def _sorted_kinds(kinds: Iterable[str]) -> list[str]:
    """Distinct kinds of modules, in the order in which a block computes them where that is known."""
    found = list(dict.fromkeys(kinds))
    parents = list(dict.fromkeys(kind.rpartition(".")[0] for kind in found))

    def order(kind: str) -> tuple[int, int]:
        parent, _, name = kind.rpartition(".")
        return parents.index(parent), ORDER.index(name) if name in ORDER else len(ORDER)

    return sorted(found, key=order)


def _cells(votes: NDArray[np.float32], where: Labels, n_kinds: int, n_numbers: int) -> Array:
    """(kinds + 1, layers + 1) means over queries and modules; means of rows and columns come last."""
    there = ~np.isnan(votes)
    sums, counts = np.zeros((2, n_kinds * n_numbers))
    np.add.at(sums, where, np.where(there, votes, 0).sum(0, dtype=np.float64))
    np.add.at(counts, where, there.sum(0))

    def framed(values: Array) -> Array:
        table = values.reshape(n_kinds, n_numbers)
        table = np.vstack([table, table.sum(0)])
        return np.column_stack([table, table.sum(1)])

    total, count = framed(sums), framed(counts)
    out: Array = np.full(total.shape, np.nan)
    return np.divide(total, count, out=out, where=count > 0)


def _strongest(cells: Array, kinds: Sequence[str], numbers: Sequence[str]) -> list[tuple[str, float]]:
    inner = np.nan_to_num(cells[:-1, :-1], nan=-np.inf)
    order = np.argsort(-inner, axis=None, kind="stable")[:3]
    found = [(*np.unravel_index(k, inner.shape), inner.flat[k]) for k in order]
    return [
        (f"layer {numbers[column]} {kinds[row]}" if numbers[column] else kinds[row], float(value))
        for row, column, value in found
        if np.isfinite(value)
    ]


def data(run: Run, listed: Sequence[int]) -> dict[str, Any]:
    """What the page's script needs of the listed queries; numbers are whole, to keep the file small."""
    rows = [run.rows[k] for k in listed]
    limit = _limit(rows)
    found: dict[str, Any] = {
        "names": run.shown,
        "files": run.files,
        "routes": run.routes,
        "temperature": run.record["flags"].get("temperature"),
        "limit": limit,
        "ids": [_cut(row.id, limit) for row in rows],
        "file": [row.file for row in rows],
        "texts": [None if row.text is None else _cut(row.text, limit) for row in rows],
        "predictions": [_cut(row.prediction, limit) for row in rows],
    }
    if run.names:
        found["variants"] = run.labels[listed].tolist()
        found["weights"] = [_bars(row) for row in run.weights[listed]]
        found["guesses"] = np.flatnonzero(run.guesses[listed]).tolist()
        found["variantNames"] = [_made_of(run.shown, row) for row in variant_weights(run)]
    if run.routes:
        points, axes = gate_space(run)
        places, prototypes, found["how"] = layout(points[listed])
        found["places"] = (places * 10_000).round().astype(int).tolist()
        found["prototypes"] = [
            [axis, *place] for axis, place in zip(axes, (prototypes * 10_000).round().astype(int).tolist(),
                                                  strict=True)
        ]  # fmt: skip
    if run.evidence:
        found |= _reasons(run.evidence, run.weights, listed)
    return found


def _bars(row: Array) -> list[int]:
    """Candidate and weight in tenths of a per cent, heaviest first, one after the other."""
    order = np.argsort(-row, kind="stable")[:BARS].tolist()
    return [value for k in order if row[k] >= 0.0005 for value in (k, round(float(row[k]) * 1000))]


def _made_of(names: Sequence[str], row: Array) -> str:
    order = np.argsort(-row, kind="stable")[:2].tolist()
    return ", ".join(f"{names[k]} {row[k]:.2f}" for k in order if row[k] >= 0.1)


def _reasons(evidence: Evidence, weights: Array, listed: Sequence[int]) -> dict[str, Any]:
    """Of each query the adapters that matter: number, response, score; then what trials gave."""
    scores, candidates = evidence.scores[listed], evidence.candidates[listed]
    tried = np.isfinite(candidates[:, :-1])
    # Those with a weight come first, then those that were tried, then the highest scores.
    rank = np.where(np.isnan(scores), -np.inf, scores.clip(-400, 400) + 1e3 * tried)
    rank += 1e4 * (weights[listed, :-1] > 0) + 1e4 * weights[listed, :-1]
    order = np.argsort(-rank, axis=1, kind="stable")[:, :EXPLAINED]
    numbers = [
        evidence.responses[listed] * 1e4, scores * 100, candidates[:, :-1] * 100,
        evidence.effect[listed] * 100, evidence.confidence[listed] * 100,
    ]  # fmt: skip
    columns = [_whole(np.take_along_axis(values, order, 1)) for values in numbers]
    there = np.isfinite(np.take_along_axis(scores, order, 1))
    once = np.take_along_axis(tried, order, 1)
    return {
        "reasons": [
            [
                [int(k), *(column[q, n].item() for column in columns[: 5 if once[q, n] else 2])]
                for n, k in enumerate(row)
                if there[q, n]
            ]
            for q, row in enumerate(order)
        ],
        "tried": tried.sum(1).tolist(),
        "baseLevel": _whole(candidates[:, -1] * 100).tolist(),
        "baseConfidence": _whole(evidence.base_confidence[listed] * 100).tolist(),
    }


def _whole(values: NDArray[np.float32]) -> Labels:
    return np.nan_to_num(values, nan=0, posinf=0, neginf=0).round().astype(np.int64)


def _limit(rows: Sequence[Row]) -> int:
    """To how many characters texts are cut, so that all of them stay within TEXT_BYTES."""

    def size(limit: int) -> int:
        texts = [_cut(text, limit) for row in rows for text in (row.id, row.text or "", row.prediction)]
        return len(_escaped(texts).encode())

    return LIMITS[max(0, bisect_right(LIMITS, TEXT_BYTES, key=size) - 1)]


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"


def _plain(values: Array) -> list[list[float | None]]:
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


# The page


def render(run: Run) -> str:
    """The page of a run."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    listed = _listed(run)
    found = data(run, listed)
    rows = variants(run, {k: n for n, k in enumerate(listed)}) if run.names else []
    layered = layers(run)
    found["layers"] = layered["groups"] if layered else []
    environment = Environment(autoescape=True, undefined=StrictUndefined, lstrip_blocks=True)
    environment.filters |= {"number": _number, "duration": _duration, "digest": _digest, "value": _value}
    template = environment.from_string(
        resources.files("router").joinpath("report.html.j2").read_text("utf-8")
    )
    return template.render(
        headline=headline(run), run=run, record=run.record, listed=len(listed), variants=rows,
        heat=heat(run, rows), layers=layered, limit=found["limit"], how=found.get("how", ""),
        cut=_is_cut(run, found["limit"]), explained=EXPLAINED,
        data=Markup(_escaped(found)),
    )  # fmt: skip


def _listed(run: Run) -> list[int]:
    """The queries in map and table: all, or the least sure if they are too many."""
    if len(run.rows) <= LISTED:
        return list(range(len(run.rows)))
    if not run.names:
        return list(range(LISTED))
    return sorted(np.argsort(run.weights.max(1), kind="stable")[:LISTED].tolist())


def _is_cut(run: Run, limit: int) -> bool:
    return any(len(text) > limit for row in run.rows for text in (row.text or "", row.prediction))


def _escaped(value: Any) -> str:
    """JSON that may stand in a script block: no tag can begin in it, and no line end is hidden in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _number(value: float | None, digits: int = 0) -> str:
    return "none" if value is None else f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _digest(text: str) -> str:
    """As a content security policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _value(value: Any) -> str:
    """A setting in words."""
    if value is None:
        return "default"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for input that a person can mend."""
    p = argparse.ArgumentParser(
        prog="python -m router.report", description="Makes report.html from the files of a finished run."
    )
    p.add_argument("folder", type=Path, metavar="DIR", help="the run's output folder")
    try:
        print(write_report(p.parse_args(argv).folder))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
