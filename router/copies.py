"""Adapters that are one adapter in several sizes: the gate cannot tell them apart, so one stands for all.

Which size is right nobody can say without trying it on labelled data; the middle one is taken, since a
copy that somebody blew up or shrank is more likely at either end. Knows no queries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from merge.factors import inner
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
                if apart < ALIKE and cosine(adapters[n], adapters[first]) > SAME:
                    group.append(n)
                    break
        else:
            groups.append([n])
    out = np.arange(len(adapters))
    for group in groups:
        if len(group) > 1:
            sizes = np.array([size(adapters[n]) for n in group])
            middle = np.sort(sizes)[(len(group) - 1) // 2]
            out[group] = group[int(np.isclose(sizes, middle, rtol=1e-3).argmax())]
    return out


def size(adapter: Adapter) -> float:
    """The Frobenius norm of all updates of an adapter."""
    return float(sum(inner(update, update) for _, update in adapter.read_all()) ** 0.5)


def cosine(one: Adapter, other: Adapter) -> float:
    """The cosine of two adapters' updates, all modules taken as one vector; in [-1, 1]."""
    theirs = dict(other.read_all())
    both = sum(inner(update, theirs[module]) for module, update in one.read_all() if module in theirs)
    norms = size(one) * size(other)
    return both / norms if norms else 0.0
