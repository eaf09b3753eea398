"""Adapters that read alike, duplicates and look-alikes: one represents all, as no gate can tell them apart.

Duplicates are one adapter in several sizes. Nobody can say which size is right without labelled data. The
middle one is taken, since one that somebody scaled up or down is more likely at either end. Look-alikes
read the same inputs and write something else, as a copy does that was made to do harm. The one listed first
is taken, since the order is all that a user has said of whom to trust. Knows no queries.
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from merge.factors import Factors, gram, svd
from router.library.adapters import Adapter
from router.system.progress import progress

# Two adapters may read alike if they share more than half of the modules of each, and the root mean square
# difference of their log responses to generic text there is below ALIKE. They do if what they read overlaps
# by more than OVERLAP. They are duplicates if the cosine of their updates is above SAME.
ALIKE = 0.06
OVERLAP = 0.7
SAME = 0.99
SAMPLE = 8  # modules at which two adapters that may read alike are compared
COLUMNS = 1024  # numbers in a sketch, about; all pairs are compared by their sketches first
BLOCK = 256  # adapters that are looked for at a time


def representatives(
    adapters: Sequence[Adapter], responses: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The representative of each adapter, which is itself if none reads alike, (adapters,).

    It is the first that reads so, or of the first one's duplicates the one of median size (the lower of two
    medians, and the first of equal ones).

    Args:
        adapters: the library.
        responses: (generic prompts, adapters, modules) to generic text, NaN without a prototype.

    Returns:
        The number of each one's representative, and whether it is a look-alike of it, (adapters,) each.
    """
    there = ~np.isnan(responses[0])  # (adapters, modules)
    flat = _flat_logs(responses)
    logs = flat.reshape(len(adapters), *responses[:, 0].shape)  # (adapters, prompts, modules)
    groups: dict[int, list[int]] = {}  # by the first of each
    near = progress(nearby(flat, there), total=len(adapters), desc="duplicates", unit="adapter")
    for n, others in enumerate(near):
        for first in others:
            if first in groups:
                apart = (logs[n] - logs[first])[:, there[n] & there[first]]
                if np.square(apart).mean() < ALIKE**2 and _read_alike(adapters[n], adapters[first]):
                    groups[first].append(n)
                    break
        else:
            groups[n] = [n]
    out = np.arange(len(adapters))
    lookalike = np.zeros(len(adapters), bool)
    for group in groups.values():
        if len(group) > 1:
            pairs = [norms_and_cosines([adapters[group[0]], adapters[n]]) for n in group]
            same = np.array(
                [n == group[0] or cosines[0, 1] > SAME for n, (_, cosines) in zip(group, pairs, strict=True)]
            )
            sizes = np.array([norms[1] for norms, _ in pairs])
            middle = np.sort(sizes[same])[(same.sum() - 1) // 2]
            out[group] = group[int((same & np.isclose(sizes, middle, rtol=1e-3)).argmax())]
            lookalike[group] = ~same
    return out, lookalike


def nearby(flat: NDArray[np.float32], there: NDArray[np.bool_]) -> Iterator[list[int]]:
    """For each adapter in turn, those that may be alike where both have a prototype, in ascending order.

    They share more than half of the modules of each. They are looked for among sketches, so only few pairs
    are compared in full. A sketch has the mean log response at each module to each of several groups of
    prompts. Means, times the root of how many they are of, are a projection, in which two adapters are never
    farther apart than they are; so none is missed.

    Args:
        flat: (adapters, prompts * modules) log responses, 0 without a prototype.
        there: (adapters, modules) where each has a prototype.
    """
    n_adapters, n_modules = there.shape
    n_prompts = flat.shape[1] // n_modules
    starts = np.linspace(0, n_prompts, min(n_prompts, max(1, COLUMNS // n_modules)), endpoint=False).astype(
        int
    )
    sizes = np.diff(np.append(starts, n_prompts))
    sums = np.add.reduceat(flat.reshape(n_adapters, n_prompts, n_modules), starts, axis=1, dtype=np.float64)
    means = sums.sum(0) / there.sum(0).clip(1)  # (groups, modules), taken away for small squares
    centred = np.where(there[:, None], sums - means, 0.0) / np.sqrt(sizes)[:, None]
    sketches = centred.reshape(n_adapters, -1).astype(np.float32)
    squares = np.square(centred).sum(1).astype(np.float32)
    counts = there.astype(np.float32)
    for start in range(0, n_adapters, BLOCK):
        block = slice(start, start + BLOCK)
        apart = squares[block] @ counts.T + counts[block] @ squares.T - 2 * sketches[block] @ sketches.T
        shared = counts[block] @ counts.T  # (some, adapters) modules
        most = np.maximum(counts[block].sum(1)[:, None], counts.sum(1))
        radius = 1.01 * ALIKE  # more than what rounding adds
        for row in (apart <= radius**2 * n_prompts * shared) & (2 * shared > most):
            yield np.flatnonzero(row).tolist()


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
    for owners, updates in _by_module(adapters):
        inner[np.ix_(owners, owners)] += gram(updates).numpy()
    norms = np.sqrt(inner.diagonal().clip(0))  # rounding may leave a zero just below
    sizes = np.outer(norms, norms)
    return norms, np.divide(inner, sizes, out=np.zeros_like(inner), where=sizes > 0)


def _read_alike(one: Adapter, other: Adapter) -> bool:
    modules = sorted(one.folder.shapes.keys() & other.folder.shapes.keys())  # the others' updates are zero
    return bool(overlaps([one, other], modules[:: -(-len(modules) // SAMPLE)])[0, 1] > OVERLAP)


def overlaps(adapters: Sequence[Adapter], modules: Sequence[str] | None = None) -> NDArray[np.float64]:
    """How much of what they read all pairs have in common, (adapters, adapters) in [0, 1].

    An adapter reads a module's inputs with `P = V diag(w) V^T` of its prototype, as in
    router/routing/prototypes.py. The overlap is the cosine of two such matrices, all modules as one vector.
    What is written plays no part.

    Args:
        modules: the modules to compare at, which all adapters change; None takes all.
    """
    inner = np.zeros((len(adapters), len(adapters)))
    for owners, updates in _by_module(adapters, modules):
        read = []
        for update in updates:
            _, s, vh = svd(update)  # (k,), (k, d_in)
            rows = vh * (s / s.sum().clamp_min(1e-30)).sqrt()[:, None]
            read.append(Factors(rows, rows.T))
        inner[np.ix_(owners, owners)] += gram(read).numpy()
    sizes = np.sqrt(np.outer(inner.diagonal(), inner.diagonal()))
    return np.divide(inner, sizes, out=np.zeros_like(inner), where=sizes > 0)


def _by_module(
    adapters: Sequence[Adapter], modules: Sequence[str] | None = None
) -> Iterator[tuple[list[int], list[Factors]]]:
    """The numbers of the adapters that change a module, and their updates of it, module by module."""

    def numbered(n: int, adapter: Adapter) -> Iterator[tuple[str, int, Factors]]:
        return ((module, n, update) for module, update in adapter.read_all(modules))

    merged = heapq.merge(*map(numbered, range(len(adapters)), adapters), key=itemgetter(0, 1))
    for _, group in groupby(merged, key=itemgetter(0)):
        _, owners, updates = zip(*group, strict=True)
        yield list(owners), list(updates)
