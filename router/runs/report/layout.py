"""The map of a report: where queries and prototypes lie."""

import numpy as np

from router.routing.clusters import Array
from router.runs.load import Run

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


def layout(points: Array) -> tuple[Array, Array]:
    """Places queries and the axes' own directions in the unit square, by t-SNE on cosines.

    An adapter's prototype is the direction of its own axis. The same points give the same places.

    Args:
        points: (queries, axes); 2,000 queries take seconds.

    Returns:
        (queries, 2) and (axes, 2).
    """
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import minmax_scale, normalize
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    n, axes = points.shape
    both = normalize(np.vstack([points, np.eye(axes)]))
    # About as many neighbours as a candidate has queries.
    perplexity = min(max(8.0, len(both) / axes), 30.0, (len(both) - 1) / 3)
    init = "pca" if axes > 1 else "random"
    tsne = TSNE(metric="cosine", init=init, perplexity=perplexity, random_state=0)
    with threadpool_limits(1):  # threads sum in any order, and t-SNE enlarges the difference
        places = _apart(minmax_scale(tsne.fit_transform(both).astype(np.float64)))
    places = minmax_scale(places).clip(0, 1)
    return places[:n], places[n:]


def _apart(places: Array) -> Array:
    """Moves places as little as keeps most of them apart, so that marks do not hide each other."""
    from scipy.spatial import cKDTree

    distance = min(0.016, 0.35 / len(places) ** 0.5)
    k = np.arange(len(places))
    # Places that coincide first move apart in all directions.
    places = places + 0.002 * np.sqrt(k % 97 / 97)[:, None] * np.column_stack(
        [np.cos(2.4 * k), np.sin(2.4 * k)]
    )
    for _ in range(80):
        one, other = cKDTree(places).query_pairs(distance, output_type="ndarray").T
        gap = places[one] - places[other]
        length = np.linalg.norm(gap, axis=1, keepdims=True)
        push = gap * (distance / length.clip(1e-9) - 1) / 3
        np.add.at(places, one, push)
        np.subtract.at(places, other, push)
    return places
