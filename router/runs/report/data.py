"""What the report shows of a run, as numbers and short texts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.pipeline.evidence import Evidence
from router.routing.clusters import Array, losses
from router.runs.load import Labels, Run, cut
from router.runs.report.layout import gate_space, layout

EXPLAINED = 12  # adapters whose numbers are kept for each query, if there are few
NUMBERS = 120_000  # such adapters in the file, over all queries
SHOWN_QUERIES = 10_000  # a sample of more
SHOWN_VARIANTS = 100  # in the heat map and the table of variants
TEXT_BYTES = 6_000_000  # of all texts in the file
LIMITS = (2_000, 1_000, 500, 300, 200, 100, 50)  # characters of a text; the first that fits is taken
SHORT = 110  # characters of a query that is only an example
BARS = 6  # top weights kept of each query
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # within a block


def top(weights: Array, most: int, least: float) -> list[tuple[int, float]]:
    """The top candidates and their weights; those below `least` are left out."""
    order = np.argsort(-weights, kind="stable")[:most].tolist()
    return [(k, float(weights[k])) for k in order if weights[k] >= least]


def mix(names: Sequence[str], weights: Array, most: int = 3, least: float = 0.005) -> str:
    """The top candidates and their weights in words.

    Example:
        >>> mix(["french", "german", "base"], np.array([0.2, 0.79, 0.01]), most=2)
        'german 0.79, french 0.20'
    """
    return ", ".join(f"{names[k]} {weight:.2f}" for k, weight in top(weights, most, least))


def headline(run: Run) -> dict[str, Any]:
    """The numbers in the report's first sentences."""
    record = run.record
    found = {
        "seconds": sum(record.seconds.values()),
        "peak_mib": max(record.peak_mib.values(), default=0),
        "low_margin": int(run.low_margin.sum()),
    }
    if not run.names:
        return found
    *counts, to_base = np.bincount(run.weights.argmax(1), minlength=len(run.names)).tolist()
    aside = {*record.lookalikes, *(run.evidence.duplicates if run.evidence else ())}
    return found | {
        "to_base": to_base,
        "median": float(np.median(run.weights.max(1))),
        "cohesion": 1 - float(losses(run.weights, run.clusters).mean()),
        "unused": [name for name, n in zip(run.names, counts, strict=False) if not n and name not in aside],
    }


def variants(run: Run, shown: Run) -> list[dict[str, Any]]:
    """The variants that answered the most queries, largest first, with examples of those that are shown."""
    if not run.names:
        return []
    mixed, apart = run.clusters.weights, losses(run.weights, run.clusters)
    of_shown = apart if shown is run else losses(shown.weights, shown.clusters)
    found = []
    for n in largest_first(run)[:SHOWN_VARIANTS]:
        members, lines = apart[run.labels == n], nearest_first(shown.labels == n, of_shown)
        found.append(
            {
                "number": n,
                "queries": len(members),
                "weights": mixed[n].tolist(),
                "top": [(run.shown[k], weight) for k, weight in top(mixed[n], 3, 1e-6)],
                "diagonal": (int(mixed[n].argmax()), -float(mixed[n].max())),  # sorts rows along the diagonal
                "cohesion": 1 - float(members.mean()) if len(members) else None,
                "typical": [(k, shown.line(k, SHORT)) for k in lines[:3]],
                "edge": [(k, shown.line(k, SHORT)) for k in lines[3:][-3:][::-1]],
                "folder": run.record.variants[n].folder,
            }
        )
    return found


def largest_first(run: Run) -> list[int]:
    """The variants' numbers, those with the most queries first."""
    counts = np.bincount(run.labels, minlength=len(run.record.variants))
    return [int(n) for n in np.argsort(-counts, kind="stable")]


def nearest_first(members: NDArray[np.bool_], apart: Array) -> list[int]:
    """The numbers of a variant's queries, those first whose weights are the nearest to the variant's."""
    rows = np.flatnonzero(members)
    return [int(n) for n in rows[np.argsort(apart[rows], kind="stable")]]


def place_of(module: str) -> tuple[str, str, str]:
    """Splits any module's name: what stands before the layer's number, the number, the kind of module.

    Example:
        >>> place_of("model.layers.4.self_attn.q_proj")
        ('model.layers', '4', 'self_attn.q_proj')
    """
    found = re.match(r"(?:(.*?)\.)?(\d{1,9})(?:\.(.*))?$", module)
    if not found:
        return "", "", module
    kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", found[3] or "")  # a layer's experts count together
    return found[1] or "", found[2], kind


def places_of(modules: Sequence[str]) -> tuple[list[int], list[str]]:
    """The layer of each module, -1 if it has none, and its kind, with the prefix if prefixes differ."""
    parts = [place_of(module) for module in modules]
    several = len({before for before, _, _ in parts}) > 1  # such as the towers of a model
    kinds = [f"{before}: {kind}" if several else kind for before, _, kind in parts]
    return [int(number or -1) for _, number, _ in parts], kinds


def vote_means(votes: NDArray[np.float32], modules: Sequence[str]) -> tuple[list[str], list[int], Array]:
    """The mean vote of each kind of module in each layer.

    Args:
        votes: (queries, modules), NaN where there is none.

    Returns:
        The kinds, in the order in which a block computes them; the layers, -1 for modules of none; and the
        means, (kinds + 1, layers + 1), NaN where there is no vote. The last row and column are over all.
    """
    of_layer, of_kind = places_of(modules)
    numbers, kinds = sorted(set(of_layer)), sorted(dict.fromkeys(of_kind), key=_order)
    # Which modules each row or column holds.
    rows, columns = (
        np.vstack([np.array(keys)[:, None] == np.array(of), np.ones(len(of))])
        for keys, of in ((kinds, of_kind), (numbers, of_layer))
    )
    sums = np.nansum(votes, 0, dtype=np.float64), (~np.isnan(votes)).sum(0)
    total, count = ((rows * each) @ columns.T for each in sums)
    return kinds, numbers, np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def best_of(e: Evidence) -> Labels:
    """(queries,) the number of the adapter with the highest score."""
    return np.asarray(np.nan_to_num(e.scores, nan=-np.inf).argmax(1))


def layers(run: Run) -> dict[str, Any] | None:
    """Mean votes by kind of module and layer, over all queries and over those of each adapter."""
    e = run.evidence
    if e is None or not e.modules:
        return None
    best, groups = best_of(e), list[dict[str, Any]]()
    for n, name in enumerate(["all queries", *e.adapters], -1):
        votes = e.votes[(n < 0) | (best == n)]
        if len(votes):
            kinds, numbers, means = vote_means(votes, e.modules)
            cells = [[None if np.isnan(mean) else mean for mean in row] for row in means.round(2).tolist()]
            groups.append({"name": name, "queries": len(votes), "cells": cells})
    named = [
        (f"layer {number} {kind}" if number >= 0 else kind, value)
        for kind, row in zip(kinds, groups[0]["cells"], strict=False)
        for number, value in zip(numbers, row, strict=False)
        if value is not None
    ]
    strongest = sorted(named, key=lambda cell: -cell[1])[:3]
    return {"kinds": kinds, "numbers": numbers, "groups": groups, "strongest": strongest}


def _order(kind: str) -> int:
    """A kind's place in the order in which a block computes its modules, as far as that is known."""
    name = kind.rpartition(".")[2]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def data(run: Run) -> dict[str, Any]:
    """What the page's script needs to know of the queries; numbers are whole, to keep the file small."""
    texts, answers = run.texts, run.answers
    every = [*run.ids, *answers, *(text or "" for text in texts)]
    sizes = ((n, len(escaped([cut(text, n) for text in every]).encode())) for n in LIMITS)
    limit = next((n for n, size in sizes if size <= TEXT_BYTES), LIMITS[-1])
    found: dict[str, Any] = {
        "names": run.shown,
        "files": list(map(str, run.record.paths)),
        "routes": run.routes,
        "temperature": run.record.flags.get("temperature"),
        "falseAlarm": run.record.flags.get("false_positive_rate"),
        "limit": limit if any(len(text) > limit for text in every) else None,
        "ids": [cut(own, limit) for own in run.ids],
        "file": run.file.tolist(),
        "texts": [None if text is None else cut(text, limit) for text in texts],
        "predictions": [cut(answer, limit) for answer in answers],
    }
    if run.names:
        found["variants"] = run.labels.tolist()
        found["weights"] = [  # candidate and thousandths, one after the other
            [value for k, weight in top(row, BARS, 0.0005) for value in (k, round(weight * 1000))]
            for row in run.weights
        ]
        found["lowMargin"] = np.flatnonzero(run.low_margin).tolist()
        found["variantNames"] = [mix(run.shown, row, 2, 0.1) for row in run.clusters.weights]
    if run.routes:
        points, axes = gate_space(run)
        places, prototypes, found["how"] = layout(points)
        found["places"] = _whole(places * 1e4).tolist()
        found["prototypes"] = np.column_stack([axes, _whole(prototypes * 1e4)]).tolist()
    return found | (_reasons(run.evidence, run.weights) if run.evidence else {})


def explained(n_queries: int) -> int:
    """For how many adapters a query's numbers are kept, so that the file stays small."""
    return min(EXPLAINED, max(2, NUMBERS // max(1, n_queries)))


def _reasons(e: Evidence, weights: Array) -> dict[str, Any]:
    """For each query, the adapters that matter: number, response, score; the base model's score; margin."""
    scores = e.candidates[:, :-1]
    scored = np.isfinite(scores)  # all but duplicates
    # Those with a weight come first, then those with the highest scores.
    keys = -np.where(scored, scores, -np.inf), -weights[:, :-1]
    order = np.asarray(np.lexsort(keys))[:, : explained(len(weights))]
    numbers = _whole(
        100 * np.stack([np.take_along_axis(of, order, 1) for of in (100 * e.responses, scores)], axis=-1)
    )
    framed = {}
    if any(map(any, e.frames)):
        shown = [f"{cut(before, LIMITS[3])}{{query}}{cut(after, LIMITS[3])}" for before, after in e.frames]
        framed = {"frames": shown, "frame": e.frame.astype(int).tolist()}
    return framed | {
        "reasons": [
            [[k, *two] for k, two in zip(row, numbers[q].tolist(), strict=True) if scored[q, k]]
            for q, row in enumerate(order.tolist())
        ],
        "baseScore": _whole(100 * e.base_score).tolist(),
        "margin": _whole(100 * e.margin).tolist(),
    }


def _whole(values: NDArray[Any]) -> Labels:
    return np.asarray(np.nan_to_num(values, nan=0, posinf=0, neginf=0).round(), np.int64)


def escaped(value: Any) -> str:
    """JSON that may stand in a script block of a UTF-8 page: no tag can begin in it, no line end is hidden.

    Halves of characters (lone surrogates), which UTF-8 lacks, are escaped too; browsers show them as U+FFFD.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub(r"[<>&\u2028\u2029\ud800-\udfff]", lambda letter: f"\\u{ord(letter[0]):04x}", text)
