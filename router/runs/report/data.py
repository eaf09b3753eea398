"""The numbers and short texts of a run's report."""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.routing.clusters import Array, losses
from router.runs.load import Run, cut
from router.runs.report.layout import gate_space, layout

BEST = 12  # candidates whose numbers are kept for each query
SHOWN_QUERIES = 2_000  # a sample of more
SHOWN_VARIANTS = 100  # in the heat map and the table of variants
LONG, SHORT = 1_000, 110  # characters of a text, and of a query that is only an example
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # within a block


def mix(names: Sequence[str], weights: Array, most: int = 3, least: float = 0.005) -> str:
    """The top candidates and their weights in words; those below `least` are left out.

    Example:
        >>> mix(["french", "german", "base"], np.array([0.2, 0.79, 0.01]), most=2)
        'german 0.79, french 0.20'
    """
    order = np.argsort(-weights, kind="stable")[:most]
    return ", ".join(f"{names[k]} {weights[k]:.2f}" for k in order if weights[k] >= least)


def headline(run: Run) -> dict[str, Any]:
    """The numbers in the report's first sentences."""
    record = run.record
    numbers = {
        "seconds": sum(record.seconds.values()),
        "peak_mib": max(record.peak_mib.values(), default=0),
        "low_margin": int(run.evidence.low_margin.sum()) if run.evidence else 0,
    }
    if not run.names:
        return numbers
    *counts, to_base = np.bincount(run.weights.argmax(1), minlength=len(run.names)).tolist()
    aside = {*record.lookalikes, *(run.evidence.duplicates if run.evidence else ())}
    return numbers | {
        "to_base": to_base,
        "median": float(np.median(run.weights.max(1))),
        "cohesion": 1 - float(losses(run.mixes, run.clusters).mean()),
        "unused": [name for name, n in zip(run.names, counts, strict=False) if not n and name not in aside],
    }


def variants(run: Run, shown: Run) -> list[dict[str, Any]]:
    """The variants that answered the most queries, largest first, with examples of those that are shown."""
    if not run.names:
        return []
    mixed, apart = run.clusters.weights, losses(run.mixes, run.clusters)
    of_shown = losses(shown.weights, shown.clusters)
    rows = []
    for n in largest_first(run)[:SHOWN_VARIANTS]:
        members = apart[run.labels == n]
        lines = nearest_first(shown.labels == n, of_shown)
        rows.append(
            {
                "number": n,
                "queries": len(members),
                "weights": mixed[n].tolist(),
                "mix": mix(run.shown, mixed[n], least=1e-6),
                "diagonal": (int(mixed[n].argmax()), -float(mixed[n].max())),  # sorts rows along the diagonal
                "cohesion": 1 - float(members.mean()) if len(members) else None,
                "typical": [(k, shown.line(k, SHORT)) for k in lines[:3]],
                "edge": [(k, shown.line(k, SHORT)) for k in lines[3:][-3:][::-1]],
            }
        )
    return rows


def largest_first(run: Run) -> list[int]:
    """The variants' numbers, those with the most queries first."""
    counts = np.bincount(run.labels, minlength=len(run.record.variants))
    return [int(n) for n in np.argsort(-counts, kind="stable")]


def nearest_first(members: NDArray[np.bool_], apart: Array) -> list[int]:
    """The numbers of a variant's queries, those first whose weights are the nearest to the variant's."""
    rows = np.flatnonzero(members)
    return [int(n) for n in rows[np.argsort(apart[rows], kind="stable")]]


def places_of(modules: Sequence[str]) -> tuple[list[str], list[int]]:
    """The kind of each module, and its layer, -1 where there is none.

    Its kind is its name without numbers, so that a layer's experts count together, and without what all the
    names begin with.

    Example:
        >>> places_of(["model.layers.4.self_attn.q_proj", "model.layers.5.mlp.up_proj"])
        (['self_attn.q_proj', 'mlp.up_proj'], [4, 5])
    """
    parts = [module.split(".") for module in modules]
    numbers = [[int(part) for part in path if re.fullmatch("[0-9]{1,9}", part)] for path in parts]
    kinds = [[part for part in path if not re.fullmatch("[0-9]+", part)] for path in parts]
    while len({tuple(kind[:1]) for kind in kinds}) == 1 and min(map(len, kinds)) > 1:
        kinds = [kind[1:] for kind in kinds]
    return list(map(".".join, kinds)), [next(iter(row), -1) for row in numbers]


def vote_means(votes: NDArray[np.float32], modules: Sequence[str]) -> tuple[list[str], list[int], Array]:
    """The mean vote of each kind of module in each layer.

    Args:
        votes: (queries, modules), NaN where there is none.

    Returns:
        The kinds, in the order in which a block computes them; the layers, -1 for modules of none; and the
        means, (kinds + 1, layers + 1), NaN where there is no vote. The last row and column are over all.
    """
    of_kind, of_layer = places_of(modules)
    numbers, kinds = sorted(set(of_layer)), sorted(dict.fromkeys(of_kind), key=_order)
    # Which modules each row or column holds.
    rows, columns = (
        np.vstack([np.array(keys)[:, None] == np.array(of_module), np.ones(len(of_module))])
        for keys, of_module in ((kinds, of_kind), (numbers, of_layer))
    )
    sums = np.nansum(votes, 0, dtype=np.float64), (~np.isnan(votes)).sum(0)
    total, count = ((rows * each) @ columns.T for each in sums)
    return kinds, numbers, np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0)


def _order(kind: str) -> int:
    """A kind's place in the order in which a block computes its modules, as far as that is known."""
    name = kind.rpartition(".")[2]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def layers(run: Run) -> dict[str, Any] | None:
    """Mean votes by kind of module and layer, over all queries and over those of each adapter."""
    e = run.evidence
    if e is None or not e.modules:
        return None
    best, groups = e.best, list[dict[str, Any]]()
    for n, name in enumerate(["all queries", *e.adapters], -1):
        votes = e.votes[(n < 0) | (best == n)]
        if len(votes):
            kinds, numbers, means = vote_means(votes, e.modules)
            cells = [[None if np.isnan(mean) else mean for mean in row] for row in means.round(2).tolist()]
            groups.append({"name": name, "queries": len(votes), "cells": cells})
    return {"kinds": kinds, "numbers": numbers, "groups": groups}


def data(run: Run) -> dict[str, Any]:
    """The facts about queries that the page's script needs."""
    e = run.evidence
    texts = [
        (query.marked(int(e.later[n])) if e else query.input) if query else None
        for n, query in enumerate(run.queries)
    ]
    facts: dict[str, Any] = {
        "names": run.shown,
        "files": list(map(str, run.record.paths)),
        "temperature": run.record.flags.get("temperature"),
        "falsePositiveRate": run.record.flags.get("false_positive_rate"),
        "cut": any(len(text or "") > LONG for text in (*run.ids, *run.answers, *texts)),
        "ids": [cut(id_, LONG) for id_ in run.ids],
        "file": run.file.tolist(),
        "texts": [None if text is None else cut(text, LONG) for text in texts],
        "predictions": [cut(answer, LONG) for answer in run.answers],
    }
    if run.routes:
        points, axes = gate_space(run)
        places, prototypes = layout(points)
        facts |= {
            "variants": run.labels.tolist(),
            "variantNames": [mix(run.shown, row, 2, 0.1) for row in run.clusters.weights],
            "candidates": [[[round(x, 4) for x in row] for row in rows] for rows in candidates(run)],
            "places": places.round(4).tolist(),
            "prototypes": np.column_stack([axes, prototypes.round(4)]).tolist(),
        }
    if e:
        facts["lowMargin"] = np.flatnonzero(e.low_margin).tolist()
    if e and any(map(any, e.frames)):
        facts["frames"] = [f"{cut(before, LONG)}{{query}}{cut(after, LONG)}" for before, after in e.frames]
        facts["frame"] = e.frame.astype(int).tolist()
    return facts


def candidates(run: Run, most: int = BEST) -> list[list[list[float]]]:
    """For each query its best candidates, the base model always among them: those with a weight come first.

    Each has its number, its weight and, with evidence, its score and its response, which is 0 for the base
    model. An adapter without a score, such as a duplicate, is left out.
    """
    e = run.evidence
    base = len(run.names) - 1
    columns: list[NDArray[Any]] = [run.weights]
    if e:
        columns += [e.candidates, np.column_stack([e.responses, np.zeros(len(e.responses))])]
    level = columns[1 if e else 0]
    scored = np.isfinite(level)
    keys = -np.where(scored, level, -np.inf), -np.where(scored, run.weights.round(3), -1)
    order = np.asarray(np.lexsort(keys))[:, :most]
    order[~(order == base).any(1), -1] = base
    kept = [
        np.nan_to_num(np.take_along_axis(column, order, 1).astype(np.float64), nan=0.0) for column in columns
    ]
    numbers = np.stack([order, *kept], axis=-1)
    return [
        [[int(row[0]), *row[1:]] for row in rows.tolist() if scored[q, int(row[0])]]
        for q, rows in enumerate(numbers)
    ]


def escaped(value: Any) -> str:
    """JSON that may stand in a script block of a UTF-8 page: no tag can begin in it, no line end is hidden.

    Halves of characters (lone surrogates), which UTF-8 lacks, are escaped too; browsers show them as U+FFFD.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return re.sub(r"[<>&\u2028\u2029\ud800-\udfff]", lambda letter: f"\\u{ord(letter[0]):04x}", text)
