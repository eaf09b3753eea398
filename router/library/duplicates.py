"""Duplicates: one adapter in several sizes. The gate cannot tell them apart, so one represents all.

Nobody can say which size is right without labelled data. The middle one is taken, since one that somebody
scaled up or down is more likely at either end. Knows no queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import merge
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from merge.factors import Factors, gram
from router.library.adapters import Adapter
from router.progress import progress

# Two adapters are compared in full if the root mean square difference of their log responses to generic text
# is below ALIKE. They are duplicates if the cosine of their updates is above SAME.
ALIKE = 0.05
SAME = 0.99
COLUMNS = 1024  # of the sketches in which those that may be alike are looked for, about
BLOCK = 256  # adapters that are looked for at a time


def representatives(adapters: Sequence[Adapter], responses: NDArray[np.float32]) -> NDArray[np.int64]:
    """The representative of each adapter, which is itself if it has no duplicates; (adapters,).

    Among duplicates it is the one of median size (the lower of two medians), and the first of equal ones.

    Args:
        adapters: the library.
        responses: (generic prompts, adapters, modules) to generic text, NaN without a prototype.
    """
    there = ~np.isnan(responses[0])  # (adapters, modules)
    flat = _flat_logs(responses)
    groups: dict[int, list[int]] = {}  # by the first of each
    near = progress(nearby(flat, there), total=len(adapters), desc="duplicates", unit="adapter")
    for n, others in enumerate(near):
        count = max(1, there[n].sum() * len(responses))
        for first in others:
            if first in groups:
                apart = np.sqrt(np.square(flat[n] - flat[first]).sum() / count)
                if apart < ALIKE and norms_and_cosines([adapters[n], adapters[first]])[1][0, 1] > SAME:
                    groups[first].append(n)
                    break
        else:
            groups[n] = [n]
    out = np.arange(len(adapters))
    for group in groups.values():
        if len(group) > 1:
            sizes = np.array([norms_and_cosines([adapters[n]])[0][0] for n in group])
            middle = np.sort(sizes)[(len(group) - 1) // 2]
            out[group] = group[int(np.isclose(sizes, middle, rtol=1e-3).argmax())]
    return out


def nearby(flat: NDArray[np.float32], there: NDArray[np.bool_]) -> Iterator[list[int]]:
    """For each adapter in turn, those of the same modules that may be alike, in ascending order.

    faiss looks for them among sketches, so only few pairs are compared in full. A sketch has the mean log
    response at each module to each of several groups of prompts. Means, times the root of how many they are
    of, are a projection, in which two adapters are never farther apart than they are; so none is missed.

    Args:
        flat: (adapters, prompts * modules) log responses.
        there: (adapters, modules) where each has a prototype.
    """
    import faiss

    n_modules = there.shape[1]
    n_prompts = flat.shape[1] // n_modules
    starts = np.linspace(0, n_prompts, min(n_prompts, max(1, COLUMNS // n_modules)), endpoint=False).astype(
        int
    )
    sizes = np.diff(np.append(starts, n_prompts))
    sums = np.add.reduceat(flat.reshape(len(flat), n_prompts, n_modules), starts, axis=1, dtype=np.float64)
    sketches = (sums / np.sqrt(sizes)[:, None]).reshape(len(flat), -1)
    patterns, kind = np.unique(there, axis=0, return_inverse=True)
    kind = kind.ravel()  # NumPy 2.0 gives it two dimensions
    found: list[Iterator[list[int]]] = []

    def of_pattern(members: NDArray[np.int64], radius: float) -> Iterator[list[int]]:
        points = (sketches[members] - sketches[members].mean(0)).astype(np.float32)
        index = faiss.IndexFlatL2(points.shape[1])
        index.add(points)
        for start in range(0, len(members), BLOCK):
            ends, _, numbers = index.range_search(points[start : start + BLOCK], radius**2)
            for own in np.split(numbers, ends[1:-1].astype(int)):
                yield members[np.sort(own)].tolist()

    for k, pattern in enumerate(patterns):
        radius = 1.01 * ALIKE * np.sqrt(max(1, n_prompts * pattern.sum()))  # more than what rounding adds
        found.append(of_pattern(np.flatnonzero(kind == k), radius))
    for k in kind.tolist():  # those of a pattern come in order
        yield next(found[k])


def _flat_logs(responses: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log responses, (adapters, prompts * modules), 0 without a prototype; in place, to save memory."""
    flat = np.ascontiguousarray(responses.transpose(1, 0, 2))
    flat = (flat.copy() if np.may_share_memory(flat, responses) else flat).reshape(len(flat), -1)
    np.log(flat.clip(1e-6, out=flat), out=flat)
    np.nan_to_num(flat, copy=False)
    return flat


def norms_and_cosines(adapters: Sequence[Adapter]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The Frobenius norm of each adapter's updates and the cosines of all pairs, all modules as one vector.

    One module of all adapters is in memory at a time, and each file is opened once. A zero update has a
    cosine of 0 with all others.

    Returns:
        norms (adapters,), cosines (adapters, adapters).
    """
    inner = np.zeros((len(adapters), len(adapters)))
    streams = (_numbered(n, adapter) for n, adapter in enumerate(adapters))
    for _, found in groupby(merge(*streams, key=itemgetter(0, 1)), key=itemgetter(0)):
        _, owners, updates = zip(*found, strict=True)
        inner[np.ix_(owners, owners)] += gram(updates).numpy()
    norms = np.sqrt(inner.diagonal().clip(0))  # rounding may leave a zero just below
    sizes = np.outer(norms, norms)
    return norms, np.divide(inner, sizes, out=np.zeros_like(inner), where=sizes > 0)


def _numbered(number: int, adapter: Adapter) -> Iterator[tuple[str, int, Factors]]:
    """An adapter's updates in order of module, with its number."""
    for module, update in adapter.read_all():
        yield module, number, update
