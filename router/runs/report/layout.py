"""The map of a report: where queries and prototypes lie."""

from __future__ import annotations

import numpy as np

from router.routing.clusters import Array
from router.runs.load import Run

MAPPED = 2_000  # queries that the map is fitted to, at most; the others are placed among them
AXES = 256  # candidates; of more, those with a weight have axes


def gate_space(run: Run) -> tuple[Array, list[int]]:
    """Directions of the queries, (queries, d), and which candidate each of the d axes belongs to.

    With evidence, an axis is a candidate's score as far as it is above generic text; the base model's is the
    threshold that an adapter has to exceed. Without evidence, it is the weight.
    """
    weighty = np.asarray(run.weights.any(0))
    if run.evidence is None:
        axes = np.flatnonzero(weighty).tolist()
        return run.weights[:, axes], axes
    points = run.evidence.candidates
    there = np.asarray(np.isfinite(points).any(0))  # a duplicate has no score
    axes = np.flatnonzero(there & weighty if len(there) > AXES else there).tolist()
    # Off a query's shortlist an adapter does not stand out.
    return np.nan_to_num(points[:, axes].astype(np.float64), nan=0.0).clip(0), axes


def layout(points: Array) -> tuple[Array, Array, str]:
    """Places queries and the axes' own directions in the unit square, by t-SNE on cosines.

    An adapter's prototype is the direction of its own axis. Beyond MAPPED queries a sample is fitted, and
    each query lies amid the three in it that are most like it. The same points give the same places.

    Returns:
        (queries, 2), (axes, 2), and a sentence on how it was made.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    n, axes = points.shape
    chosen = np.arange(n) if n <= MAPPED else np.random.default_rng(0).choice(n, MAPPED, replace=False)
    fitted = _unit(np.vstack([points[chosen], np.eye(axes)]))
    with threadpool_limits(1):  # threads sum in any order, and t-SNE enlarges the difference
        flat, how = _flat(fitted)
        if n > MAPPED:
            from sklearn.neighbors import NearestNeighbors

            nearest = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(fitted[:-axes])
            alike = nearest.kneighbors(_unit(points), return_distance=False)
            flat = np.vstack([flat[alike].mean(1), flat[-axes:]])
            how += f" of a sample of {MAPPED:,}; each query lies amid the most similar ones of the sample"
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

    # About as many neighbours as a candidate has queries.
    perplexity = min(max(8.0, len(points) / points.shape[1]), 30.0, (len(points) - 1) / 3)
    tsne = TSNE(metric="cosine", init="pca", learning_rate="auto", perplexity=perplexity, random_state=0)
    return np.asarray(tsne.fit_transform(points), dtype=np.float64), "t-SNE on cosines"


def _square(places: Array) -> Array:
    """Places stretched to the unit square."""
    low, span = places.min(0), np.ptp(places, axis=0)
    return np.asarray((places - low) / np.where(span > 0, span, 1))


def _apart(places: Array, distance: float) -> Array:
    """Moves places as little as keeps most of them `distance` apart, so that marks do not hide each other."""
    from scipy.spatial import cKDTree

    # Places that coincide first move apart in all directions.
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
