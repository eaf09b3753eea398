"""From weights per query to a few variants: groups of like mixes, by faiss k-means. Knows no models."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PURE = 0.5  # an adapter with more than this share of the adapters' weight answers alone; see docs/method.md
NEGLIGIBLE = 0.01  # a share of a variant that is not worth its rank
PER_BEST = 1.5  # times as many variants are made, at most, as candidates are some query's best
# Limits of the total variation distance between a query's own mix and its variant's: on average, and at
# worst. The second keeps the few queries of a rare task from drowning in a large group; two pure groups that
# were one would lose 0.5.
MEAN_LOSS, WORST_LOSS = 0.05, 0.45
SAMPLE = 20_000  # queries that groups are made from; of more, the others join the nearest group
BLOCK = 4_096  # such queries at a time
LARGE = 256  # candidates that are a query's best; of more, groups are made without k-means


@dataclass(frozen=True)
class Clusters:
    """Queries grouped by weights.

    Attributes:
        labels: (queries,) variant of each query, 0-based; variants are numbered by their first query.
        weights: (variants, candidates) mean mix of each variant's queries; rows sum to 1.
    """

    labels: NDArray[np.int64]
    weights: Array


def mixes(weights: Array, sharp: bool = True) -> Array:
    """The mix that answers each query best, (queries, candidates); rows sum to 1.

    The base model, the last candidate, answers alone or not at all: it answers where it has the largest
    weight, and has no share elsewhere, since a share of an adapter does less well than all of it or none. Of
    the adapters one answers alone if it has more than PURE of their weight. Two equal halves, the average of
    two adapters, stay a mix.

    Args:
        sharp: False takes weights as they are, of methods whose weights are shares by their own formula.

    Example:
        >>> mixes(np.array([[0.4, 0.3, 0.3], [0.35, 0.35, 0.3], [0.3, 0.3, 0.4]]))
        array([[1. , 0. , 0. ],
               [0.5, 0.5, 0. ],
               [0. , 0. , 1. ]])
    """
    if not sharp:
        return weights
    best = weights.argmax(1)
    last = weights.shape[1] - 1
    adapters = weights / np.where(best == last, 1.0, 1.0 - weights[:, -1])[:, None]
    adapters[:, -1] = 0.0
    alone = (best == last) | (adapters.max(1) > PURE + 1e-9)  # what rounding adds to a half
    adapters[alone] = 0.0
    adapters[alone, best[alone]] = 1.0
    return np.asarray(adapters)


def most_variants(best: int) -> int:
    """The most variants that are made, where `best` candidates are some query's best."""
    return math.ceil(PER_BEST * best)


def cluster(weights: Array, n_variants: int | None, seed: int, sharp: bool = True) -> Clusters:
    """Groups queries so that few variants serve them all.

    Args:
        weights: (queries, candidates), rows sum to 1.
        n_variants: how many groups; None takes the fewest, at most `most_variants`, for which the losses of
            their `mixes` are on average at most MEAN_LOSS and none is above WORST_LOSS.
        seed: of k-means.
        sharp: as of `mixes`.

    Raises:
        ValueError: n_variants below 1.

    Example:
        >>> weights = np.array([[0.5, 0.5, 0.0], [0.1, 0.9, 0.0], [0.4, 0.4, 0.2]])
        >>> found = cluster(weights, None, seed=0)
        >>> found.labels
        array([0, 1, 0])
        >>> found.weights
        array([[0.5, 0.5, 0. ],
               [0. , 1. , 0. ]])
    """
    if n_variants is not None and n_variants < 1:
        raise ValueError(f"expected at least 1 variant, got {n_variants}")
    if len(weights) > SAMPLE:
        some = weights[_sample(weights, seed, sharp)]
        return _joined(weights, _clustered(some, n_variants, seed, sharp), sharp)
    return _clustered(weights, n_variants, seed, sharp)


def _clustered(weights: Array, n_variants: int | None, seed: int, sharp: bool) -> Clusters:
    """As `cluster`, of as many queries as there are."""
    best = len(np.unique(weights.argmax(1)))
    used = np.append(weights[:, :-1].any(0), True)  # in a large library most are in no query's mix
    points = mixes(weights[:, used], sharp)
    if n_variants is not None:
        clusters = _kmeans(points, min(n_variants, _distinct(points)), seed)
    elif best <= LARGE:
        clusters = _fewest(points, most_variants(best), seed)
    else:  # k-means would take too long
        clusters = _of_same_adapters(points, most_variants(best) - best)
    wide = np.zeros((len(clusters.weights), weights.shape[1]))
    wide[:, used] = clusters.weights
    return Clusters(clusters.labels, wide)


def _of_same_adapters(weights: Array, most: int) -> Clusters:
    """A group for each candidate that answers alone, and for each of the most frequent sets of adapters.

    There are at most `most` of these sets; a mix of any other is answered by its first adapter.
    """
    labels = weights.argmax(1)
    shared = np.flatnonzero(weights.max(1) < 1)
    sets = np.packbits(weights[shared] >= NEGLIGIBLE, axis=1)
    _, kind, counts = np.unique(sets, axis=0, return_inverse=True, return_counts=True)
    frequent = np.argsort(-counts, kind="stable")[:most]
    kept = np.isin(kind.ravel(), frequent)
    labels[shared[kept]] = weights.shape[1] + kind.ravel()[kept]
    rare = shared[~kept]
    weights = weights.copy()
    weights[rare] = np.eye(weights.shape[1])[labels[rare]]
    return _numbered(weights, labels)


def _distinct(weights: Array) -> int:
    return len(np.unique(weights.round(6), axis=0))


def _fewest(weights: Array, most: int, seed: int) -> Clusters:
    """The fewest groups of mixes, at most `most`, that lose little."""
    # The loss falls almost monotonically with K, so bisection finds the smallest K.
    low, high = 1, min(most, _distinct(weights))
    clusters = _kmeans(weights, high, seed)
    while low < high:
        middle = (low + high) // 2
        tried = _kmeans(weights, middle, seed)
        lost = losses(weights, tried)
        if lost.mean() <= MEAN_LOSS and lost.max() <= WORST_LOSS:
            high, clusters = middle, tried
        else:
            low = middle + 1
    return clusters


def _sample(weights: Array, seed: int, sharp: bool) -> NDArray[np.int64]:
    """SAMPLE queries in order, among them the first that each candidate answers alone, and the first mix."""
    kinds = np.empty(len(weights), np.int64)
    for part in _blocks(len(weights)):
        points = mixes(weights[part], sharp)
        kinds[part] = 2 * points.argmax(1) + (points.max(1) < 1)
    firsts = np.unique(kinds, return_index=True)[1]
    rest = np.setdiff1d(np.arange(len(weights)), firsts)
    more = max(0, SAMPLE - len(firsts))
    return np.sort(np.concatenate([firsts, np.random.default_rng(seed).choice(rest, more, replace=False)]))


def _blocks(count: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, count, BLOCK)]


def _joined(weights: Array, made: Clusters, sharp: bool) -> Clusters:
    """The groups of a sample with all queries in them, each in the nearest one."""
    labels = np.empty(len(weights), np.int64)
    sums = np.zeros_like(made.weights)
    for part in _blocks(len(weights)):
        points = mixes(weights[part], sharp)
        labels[part] = _closest(points, made.weights)
        np.add.at(sums, labels[part], points)
    alone = made.weights.max(1) == 1
    sums[alone] = made.weights[alone]  # as it was made, whatever mixes came to it
    groups, labels = _by_first(labels)
    return Clusters(labels, sums[groups] / sums[groups].sum(1, keepdims=True))


def with_base(centres: Array) -> Array:
    """The mean mixes of groups and, if none is the base model alone, that too: queries to come may need it.

    Args:
        centres: (variants, candidates), as the weights of `Clusters`.

    Example:
        >>> with_base(np.array([[0.5, 0.5, 0.0]])).tolist()
        [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    """
    if np.isclose(centres[:, -1], 1.0).any():
        return centres
    base = np.zeros((1, centres.shape[1]))
    base[0, -1] = 1.0
    return np.concatenate([centres, base])


def firsts(weights: Array, clusters: Clusters) -> NDArray[np.bool_]:
    """Which candidates are the first of a query in each group, (variants, candidates)."""
    first = np.zeros(clusters.weights.shape, bool)
    first[clusters.labels, weights.argmax(1)] = True
    return first


def nearest(
    weights: Array, centres: Array, leading: NDArray[np.bool_], sharp: bool = True
) -> NDArray[np.int64]:  # fmt: skip
    """The variant that answers each new query, (queries,): the nearest one made for its first candidate.

    Where there is none, since no query of the sample asked for this adapter, the base model answers.

    Args:
        weights: (queries, candidates), rows sum to 1.
        centres: (variants, candidates), as `with_base` gives them.
        leading: (variants, candidates), as `firsts` gives them.
        sharp: as of `mixes`.

    Example:
        >>> centres = np.array([[0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
        >>> later = np.array([[0.9, 0.1, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0], [0.1, 0.0, 0.9, 0.0]])
        >>> nearest(later, centres, centres > 0)
        array([1, 0, 2])
    """
    points = mixes(weights, sharp)
    there = leading[:, weights.argmax(1)].T  # (queries, variants)
    there = np.where(there.any(1, keepdims=True), there, np.isclose(centres[:, -1], 1.0))
    return np.asarray(np.where(there, _apart(points, centres), np.inf).argmin(1), np.int64)


def _apart(points: Array, centres: Array) -> Array:
    """The squared distances, less the points' own squares, (points, centres)."""
    return np.asarray((centres**2).sum(1) - 2 * points @ centres.T)


def _closest(points: Array, centres: Array) -> NDArray[np.int64]:
    return np.asarray(_apart(points, centres).argmin(1), dtype=np.int64)


def losses(weights: Array, clusters: Clusters) -> Array:
    """Total variation distance of each query's weights to its variant's, (queries,) in [0, 1].

    Example:
        >>> weights = np.array([[0.9, 0.1], [0.7, 0.3]])
        >>> one_for_both = Clusters(np.array([0, 0]), np.array([[0.8, 0.2]]))
        >>> losses(weights, one_for_both).round(3)
        array([0.1, 0.1])
    """
    distances: Array = np.abs(weights - clusters.weights[clusters.labels]).sum(1) / 2
    return distances


def _kmeans(weights: Array, k: int, seed: int) -> Clusters:
    import faiss

    points = np.ascontiguousarray(weights, dtype=np.float32)
    if k == 1:
        labels = np.zeros(len(points), dtype=np.int64)
    else:
        # k-means++, since randomly chosen first centroids may leave whole groups without one.
        kmeans = faiss.Kmeans(
            points.shape[1], k, niter=25, nredo=4, seed=seed, min_points_per_centroid=1,
            init_method=faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS,
            max_points_per_centroid=max(256, len(points)),
        )  # fmt: skip
        kmeans.train(points[np.lexsort(points.T)])  # the queries' order changes nothing
        labels = kmeans.index.search(points, 1)[1][:, 0]
    # faiss stops after 25 rounds; on from there until each query is in its nearest group.
    for _ in range(100):
        groups = np.unique(labels)
        centres = np.stack([weights[labels == n].mean(0) for n in groups])
        moved = groups[_closest(weights, centres)]
        if (moved == labels).all():
            break
        labels = moved
    return _numbered(weights, labels)


def _numbered(weights: Array, labels: NDArray[np.int64]) -> Clusters:
    """The groups of so labelled mixes, numbered by their first query."""
    groups, labels = _by_first(labels)
    means = np.stack([weights[labels == n].mean(0) for n in range(len(groups))])
    return Clusters(labels, means / means.sum(1, keepdims=True))


def _by_first(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The labels in use in order of their first query, and the number of each query's in that order."""
    groups, first, labels = np.unique(labels, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return groups[order], np.argsort(order)[labels].astype(np.int64)
