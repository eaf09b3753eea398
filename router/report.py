"""A finished run as one HTML file that needs nothing else: `python -m router.report DIR`.

Loads no model and no adapter. Queries, answers and names are hostile text: the template escapes all of them,
and what the page's script shows comes as JSON that cannot end its block.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router import finished
from router.clusters import Array, Clusters, losses
from router.errors import InputError
from router.evidence import CLOSE, Evidence
from router.submission import MULTIPLE_CHOICE, Query, replacing

Labels = NDArray[np.int64]

REPORT = "report.html"
MAPPED = 2_000  # queries that the map is fitted to; beyond, the others are placed among them
EXPLAINED = 12  # adapters whose numbers are kept for each query
VARIANTS = 100  # in the heat map and the table of variants
TEXT_BYTES = 6_000_000  # of all texts in the file
LIMITS = (2_000, 1_000, 500, 300, 200, 100, 50)  # characters of a text; the first that fits
SHORT = 110  # characters of a query where it only stands for its kind
BARS = 6  # heaviest weights kept of each query
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # within a block


@dataclass(frozen=True)
class Row:
    """A query with its answer; the text is None where it is not at hand."""

    id: str
    file: int
    text: str | None
    prediction: str

    def line(self, most: int) -> str:
        """The start of the text, or else the id, on one line."""
        return _cut(" ".join((self.text or self.id).split()), most)


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
    def clusters(self) -> Clusters:
        """The variants, with the weights that each was made with."""
        made = [[row["weights"].get(name, 0) for name in self.names] for row in self.record["variants"]]
        return Clusters(self.labels, np.array(made, np.float64))

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
        """(queries,) the two best candidates are close; none where there is no evidence."""
        return np.zeros(len(self.weights), bool) if self.evidence is None else self.evidence.guesses

    @property
    def copies(self) -> dict[str, str]:
        """Adapters that stand aside, and for each the one that is the same in another size."""
        return {} if self.evidence is None else self.evidence.copies


def write_report(folder: Path) -> Path:
    """Makes `report.html` from the files of a finished run and returns its path.

    Raises:
        InputError: files of the run are missing, or do not belong together.
    """
    html = render(load(folder))
    with replacing(folder / REPORT) as file:
        file.write(html)
    return folder / REPORT


def load(folder: Path) -> Run:
    """Reads the files of a finished run.

    Raises:
        InputError: files of the run are missing, or do not belong together.
    """
    run = finished.load(folder)
    files = list(run.files.values())
    rows = [
        Row(own, n, query.input if query else None, _spelt(query, prediction))
        for n, file in enumerate(files)
        for own, query, prediction in zip(file.ids, file.queries, file.predictions, strict=True)
    ]
    notes = [
        f"The texts of {missing} queries of {file.path} are not at hand, since the file is gone or has "
        "changed, so these queries are shown by their ids alone."
        for file in files
        if (missing := file.queries.count(None))
    ]
    return Run(
        run.record, [str(file.path) for file in files], files[0].names, rows,
        np.concatenate([file.labels for file in files]), np.concatenate([file.weights for file in files]),
        _joined([file.evidence for file in files]), notes,
    )  # fmt: skip


def _spelt(query: Query | None, prediction: str) -> str:
    """The prediction; of a multiple choice with the text of the choice whose number it is."""
    choices = query.choices if query and query.eval_type == MULTIPLE_CHOICE else ()
    return {str(n): f"{n}: {choice}" for n, choice in enumerate(choices)}.get(prediction, prediction)


def _joined(parts: Sequence[Evidence | None]) -> Evidence | None:
    """The evidence of all files as one, None if a file has none."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts):
        return None
    names = vars(found[0]).keys() - {"adapters", "modules", "copies"}
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in found]) for name in names}
    return replace(found[0], **arrays)


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
    queries lie where the three most like them in it do. The same points give the same places.

    Returns:
        (queries, 2), (axes, 2), and a sentence on how it was made.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    n, axes = points.shape
    chosen = np.arange(n) if n <= MAPPED else np.random.default_rng(0).choice(n, MAPPED, replace=False)
    fitted = _unit(np.vstack([points[chosen], np.eye(axes)]))
    with threadpool_limits(1):  # sums over threads come in any order, and t-SNE enlarges the difference
        flat, how = _flat(fitted)
        if n > MAPPED:
            from sklearn.neighbors import NearestNeighbors

            nearest = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(fitted[:-axes])
            alike = nearest.kneighbors(_unit(points), return_distance=False)
            flat = np.vstack([flat[alike].mean(1), flat[-axes:]])
            how += f" of a sample of {MAPPED:,}; all lie by those of it that are most like them"
    both = _square(flat)
    if n <= MAPPED:
        both = _square(_apart(both, min(0.016, 0.35 / len(both) ** 0.5)))
    return both[:n], both[n:], how


def _unit(points: Array) -> Array:
    lengths = np.linalg.norm(points, axis=1, keepdims=True)
    return np.asarray(points / np.where(lengths > 0, lengths, 1))


def _flat(points: Array) -> tuple[Array, str]:
    if len(points) < 12 or points.shape[1] < 2:  # too few for neighbourhoods
        u, s, _ = np.linalg.svd(points - points.mean(0), full_matrices=False)
        flat = (u * s)[:, :2]
        return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1]))), "principal components"
    from sklearn.manifold import TSNE

    # As many neighbours as a candidate has queries, more or less.
    perplexity = min(max(8.0, len(points) / points.shape[1]), 30.0, (len(points) - 1) / 3)
    tsne = TSNE(metric="cosine", init="pca", learning_rate="auto", perplexity=perplexity, random_state=0)
    return np.asarray(tsne.fit_transform(points), dtype=np.float64), "t-SNE on cosines"


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


# What the page shows


def top(weights: Array, most: int, least: float) -> list[tuple[int, float]]:
    """The heaviest candidates and their weights; those below the least are left out."""
    order = np.argsort(-weights, kind="stable")[:most].tolist()
    return [(k, float(weights[k])) for k in order if weights[k] >= least]


def mix(names: Sequence[str], weights: Array, most: int = 3, least: float = 0.005) -> str:
    """The same in words."""
    return ", ".join(f"{names[k]} {weight:.2f}" for k, weight in top(weights, most, least))


def headline(run: Run) -> dict[str, Any]:
    """The numbers of the first sentences."""
    seconds, peaks = run.record["seconds"].values(), run.record["peak_mib"].values()
    found = {"seconds": sum(seconds), "peak_mib": max(peaks, default=0), "guesses": int(run.guesses.sum())}
    if not run.names:
        return found
    *counts, to_base = np.bincount(run.weights.argmax(1), minlength=len(run.names)).tolist()
    unused = [name for name, count in zip(run.names, counts, strict=False) if not count]
    return found | {
        "to_base": to_base,
        "median": float(np.median(run.weights.max(1))),
        "cohesion": 1 - float(losses(run.weights, run.clusters).mean()),
        "unused": [name for name in unused if name not in run.copies],
    }


def variants(run: Run) -> list[dict[str, Any]]:
    """The variants that answered most queries, most first."""
    if not run.names:
        return []
    own, apart = run.clusters.weights, losses(run.weights, run.clusters)
    order = np.argsort(-np.bincount(run.labels, minlength=len(own)), kind="stable")
    found = []
    for n in order[:VARIANTS].tolist():
        members = np.flatnonzero(run.labels == n)
        members = members[np.argsort(apart[members], kind="stable")].tolist()
        found.append(
            {
                "number": n,
                "queries": len(members),
                "weights": own[n].tolist(),
                "heaviest": [(run.shown[k], weight) for k, weight in top(own[n], 3, 1e-6)],
                "diagonal": (int(own[n].argmax()), -float(own[n].max())),  # rows in this order lie along it
                "cohesion": 1 - float(apart[members].mean()) if members else None,
                "typical": [(k, run.rows[k].line(SHORT)) for k in members[:3]],
                "edge": [(k, run.rows[k].line(SHORT)) for k in members[3:][-3:][::-1]],
                "folder": run.record["variants"][n]["folder"],
            }
        )
    return found


def place_of(module: str) -> tuple[str, str, str]:
    """What stands before the layer's number, the number, and the kind of module; of any name."""
    found = re.match(r"(?:(.*?)\.)?(\d+)(?:\.(.*))?$", module)
    if not found:
        return "", "", module
    kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", found[3] or "")  # experts, say, of one layer count together
    return found[1] or "", found[2], kind


def places_of(modules: Sequence[str]) -> tuple[list[int], list[str]]:
    """The layer of each module, -1 without, and its kind; with what stands before it where that differs."""
    parts = [place_of(module) for module in modules]
    several = len({before for before, _, _ in parts}) > 1  # towers of their own
    kinds = [f"{before}: {kind}" if several else kind for before, _, kind in parts]
    return [int(number or -1) for _, number, _ in parts], kinds


def layers(run: Run) -> dict[str, Any] | None:
    """Mean votes by kind of module and layer, over all queries and over those of each adapter."""
    if run.evidence is None or not run.evidence.modules:
        return None
    of_layer, of_kind = places_of(run.evidence.modules)
    numbers, kinds = sorted(set(of_layer)), sorted(dict.fromkeys(of_kind), key=_order)
    # Which modules are in a row or column; all are in the last one, that of means.
    rows, columns = (
        np.vstack([np.array(keys)[:, None] == np.array(of), np.ones(len(of))])
        for keys, of in ((kinds, of_kind), (numbers, of_layer))
    )
    best = np.nan_to_num(run.evidence.scores, nan=-np.inf).argmax(1)
    groups = []
    for n, name in enumerate(["all queries", *run.evidence.adapters], -1):
        votes = run.evidence.votes[(n < 0) | (best == n)]
        if len(votes):
            sums = np.nansum(votes, 0, dtype=np.float64), (~np.isnan(votes)).sum(0)
            total, count = ((rows * each) @ columns.T for each in sums)
            means = np.divide(total, count, out=np.zeros_like(total), where=count > 0).round(2)
            cells: Any = np.where(count > 0, means.astype(object), None)
            groups.append({"name": name, "queries": len(votes), "cells": cells.tolist()})
    named = [
        (f"layer {number} {kind}" if number >= 0 else kind, value)
        for kind, row in zip(kinds, groups[0]["cells"], strict=False)
        for number, value in zip(numbers, row, strict=False)
        if value is not None
    ]
    strongest = sorted(named, key=lambda cell: -cell[1])[:3]
    return {"kinds": kinds, "numbers": numbers, "groups": groups, "strongest": strongest}


def _order(kind: str) -> int:
    """As a block computes its modules, where that is known."""
    name = kind.rpartition(".")[2]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def data(run: Run) -> dict[str, Any]:
    """What the page's script needs of the queries; numbers are whole, to keep the file small."""
    texts = [[row.id, row.text or "", row.prediction] for row in run.rows]
    sizes = ((n, len(_escaped([_cut(text, n) for row in texts for text in row]).encode())) for n in LIMITS)
    limit = next((n for n, size in sizes if size <= TEXT_BYTES), LIMITS[-1])
    found: dict[str, Any] = {
        "names": run.shown,
        "files": run.files,
        "routes": run.routes,
        "temperature": run.record["flags"].get("temperature"),
        "limit": limit if any(len(text) > limit for row in texts for text in row) else None,
        "ids": [_cut(row.id, limit) for row in run.rows],
        "file": [row.file for row in run.rows],
        "texts": [None if row.text is None else _cut(row.text, limit) for row in run.rows],
        "predictions": [_cut(row.prediction, limit) for row in run.rows],
    }
    if run.names:
        found["variants"] = run.labels.tolist()
        found["weights"] = [  # candidate and thousandths, one after the other
            [value for k, weight in top(row, BARS, 0.0005) for value in (k, round(weight * 1000))]
            for row in run.weights
        ]
        found["guesses"] = np.flatnonzero(run.guesses).tolist()
        found["variantNames"] = [mix(run.shown, row, 2, 0.1) for row in run.clusters.weights]
    if run.routes:
        points, axes = gate_space(run)
        places, prototypes, found["how"] = layout(points)
        found["places"] = _whole(places * 1e4).tolist()
        found["prototypes"] = np.column_stack([axes, _whole(prototypes * 1e4)]).tolist()
    return found | (_reasons(run.evidence, run.weights) if run.evidence else {})


def _reasons(e: Evidence, weights: Array) -> dict[str, Any]:
    """Of each query the adapters that matter: number, response, score; then what trials gave."""
    tried, scored = np.isfinite(e.candidates[:, :-1]), np.isfinite(e.scores)
    # Those with a weight come first, then those that were tried, then the highest scores.
    keys = -np.where(scored, e.scores, -np.inf), ~tried, -weights[:, :-1]
    order = np.asarray(np.lexsort(keys))[:, :EXPLAINED]
    parts = (100 * e.responses, e.scores, e.candidates[:, :-1], e.effect, e.confidence)
    numbers = _whole(100 * np.stack(parts, axis=-1))
    return {
        "reasons": [
            [[k, *numbers[q, k, : 5 if tried[q, k] else 2].tolist()] for k in row if scored[q, k]]
            for q, row in enumerate(order.tolist())
        ],
        "tried": tried.sum(1).tolist(),
        "lead": _whole(100 * e.lead).tolist(),
        "baseLevel": _whole(100 * e.candidates[:, -1]).tolist(),
        "baseConfidence": _whole(100 * e.base_confidence).tolist(),
    }


def _whole(values: NDArray[Any]) -> Labels:
    return np.asarray(np.nan_to_num(values, nan=0, posinf=0, neginf=0).round(), np.int64)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


# The page


def render(run: Run) -> str:
    """The page of a run."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    found, rows, layered = data(run), variants(run), layers(run)
    found["layers"] = layered["groups"] if layered else []
    used = [k for k in range(len(run.names)) if any(row["weights"][k] >= 0.005 for row in rows)]
    environment = Environment(autoescape=True, undefined=StrictUndefined, lstrip_blocks=True)
    environment.filters |= {"number": _number, "duration": _duration, "digest": _digest, "value": _value}
    template = resources.files("router").joinpath("report.html.j2").read_text("utf-8")
    return environment.from_string(template).render(
        run=run, record=run.record, headline=headline(run), variants=rows, used=used, layers=layered,
        explained=EXPLAINED, close=CLOSE, data=found, json=Markup(_escaped(found)),
    )  # fmt: skip


def _escaped(value: Any) -> str:
    """JSON that may stand in a script block: no tag can begin in it, and no line end is hidden in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for letter in "<>&\u2028\u2029":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _number(value: float | None, digits: int = 0) -> str:
    return "none" if value is None else f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} seconds"


def _digest(text: str) -> str:
    """As a content security policy names an inline script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _value(value: Any) -> str:
    """A setting in words."""
    return "default" if value is None else ", ".join(map(str, value if isinstance(value, list) else [value]))


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
