"""Adapters that are one adapter in several sizes: the gate cannot tell them apart, so one stands for all.

Which size is right nobody can say without trying it on labelled data; the middle one is taken, since a
copy that somebody blew up or shrank is more likely at either end. Knows no queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from merge.factors import gram
from router.adapters import Adapter

# Root mean square difference of two adapters' log responses to generic text, up to which they are
# compared in full, and the cosine of their updates from which one is a copy of the other.
ALIKE = 0.05
SAME = 0.99


def stand_ins(adapters: Sequence[Adapter], responses: NDArray[np.float32]) -> NDArray[np.int64]:
    """The adapter that stands for each, itself where it has no copies; (adapters,).

    Of copies it is the one of median size, the lower of two; of equals the first.

    Args:
        adapters: the library.
        responses: (generic prompts, adapters, modules) to generic text, NaN without a prototype.
    """
    there = ~np.isnan(responses[0])  # (adapters, modules)
    flat = np.nan_to_num(np.log(responses.clip(1e-6))).transpose(1, 0, 2).reshape(len(adapters), -1)
    groups: list[list[int]] = []
    for n in range(len(adapters)):
        count = max(1, there[n].sum() * len(responses))
        for group in groups:
            first = group[0]
            if (there[n] == there[first]).all():
                apart = np.sqrt(np.square(flat[n] - flat[first]).sum() / count)
                if apart < ALIKE and _cosine(adapters[n], adapters[first]) > SAME:
                    group.append(n)
                    break
        else:
            groups.append([n])
    out = np.arange(len(adapters))
    for group in groups:
        if len(group) > 1:
            sizes = np.array([_norm(adapters[n]) for n in group])
            middle = np.sort(sizes)[(len(group) - 1) // 2]
            out[group] = group[int(np.isclose(sizes, middle, rtol=1e-3).argmax())]
    return out


def _norm(adapter: Adapter) -> float:
    """The Frobenius norm of an adapter's updates, all modules as one vector."""
    return math.sqrt(sum(gram([update]).item() for _, update in adapter.read_all()))


def _cosine(one: Adapter, other: Adapter) -> float:
    """As `norms_and_cosines` has it, with each file opened once where both change the same modules."""
    if list(one.folder.shapes) != list(other.folder.shapes):
        return float(norms_and_cosines([one, other])[1][0, 1])
    inner = np.zeros((2, 2))
    for (_, mine), (_, its) in zip(one.read_all(), other.read_all(), strict=True):
        inner += gram([mine, its]).numpy()
    size = math.sqrt(inner[0, 0] * inner[1, 1])
    return float(inner[0, 1] / size) if size else 0.0


def norms_and_cosines(adapters: Sequence[Adapter]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The Frobenius norm of each adapter's updates and the cosines of all pairs, all modules as one vector.

    One module of all adapters is in memory at a time. Zero has a cosine of 0.

    Returns:
        norms (adapters,), cosines (adapters, adapters).
    """
    inner = np.zeros((len(adapters), len(adapters)))
    for module in sorted({module for adapter in adapters for module in adapter.folder.shapes}):
        owners = [n for n, adapter in enumerate(adapters) if module in adapter.folder.shapes]
        inner[np.ix_(owners, owners)] += gram([adapters[n].read(module) for n in owners]).numpy()
    norms = np.sqrt(inner.diagonal().clip(0))  # rounding may leave a zero just below
    sizes = np.outer(norms, norms)
    return norms, np.divide(inner, sizes, out=np.zeros_like(inner), where=sizes > 0)
