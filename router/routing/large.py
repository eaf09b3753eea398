"""The gate of a large library: a guess for all adapters, and a score for those on a query's shortlist.

Scores are linear in log responses, so they are products of arrays that are made once. Columns are pairs of a
module and a view. Knows no files and no models.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from router.routing.gate import FLOOR, Array, Judged, PrototypeGate, columns_of

LARGE = 256  # adapters; only a larger library is scored by shortlists
LANDMARKS = 256  # adapters that tell what all respond to alike
ROUGH = 32  # columns by which a shortlist is drawn up
SHORT = 64  # adapters on a shortlist


class Rough(NamedTuple):
    """A guess of all scores, `(slopes * log R - shares * factors).sum() - offsets` over a few columns."""

    columns: NDArray[np.int64]  # (ROUGH,)
    slopes: NDArray[np.float32]  # (adapters, ROUGH)
    shares: NDArray[np.float32]  # (adapters, ROUGH, FACTORS)
    offsets: NDArray[np.float32]  # (adapters,)


def gate_for(n_adapters: int, **settings: Any) -> PrototypeGate:
    """The gate for a library of this size, not fitted yet."""
    return (LargeGate if n_adapters > LARGE else PrototypeGate)(**settings)


class LargeGate(PrototypeGate):
    """Scores that cost little in a library of thousands of adapters.

    LANDMARKS adapters, drawn at random, tell what all respond to alike; the others' loadings follow from
    their correlations with these (Nystrom). A few columns, which make up much of each adapter's score, say
    who is on a query's shortlist; these get the scores of `PrototypeGate`, the others minus infinity.
    """

    def _landmarks(self, n_adapters: int) -> NDArray[np.int64]:
        """Drawn at random, not in equal steps, since relatives may stand at equal distances."""
        few = min(LANDMARKS, n_adapters)
        return np.sort(np.random.default_rng(0).choice(n_adapters, few, replace=False))

    def _by_module(self, X: NDArray[Any]) -> Callable[[slice], Array]:
        """Log responses as in `PrototypeGate`, made anew each time, since all would fill the memory."""
        return lambda part: columns_of(X[:, :, part])

    def _learn(self, *how: Any) -> Self:
        self.__dict__.pop("_rough", None)
        super()._learn(*how)
        for name in ("mean_", "std_", "filter_", "loadings_"):  # adapter by adapter, as they are read
            setattr(self, name, np.ascontiguousarray(getattr(self, name)))
        return self

    @cached_property
    def _rough(self) -> Rough:
        wide = len(self.filter_)
        weights = self.filter_.reshape(wide, -1)  # (adapters, columns)
        parts = weights / weights.sum(1, keepdims=True)
        columns = rough_columns(parts, ROUGH)
        known = parts[:, columns].sum(1, keepdims=True).clip(1e-3)  # scaled as if these columns were all
        weights = weights[:, columns] / known
        std, mean = (np.nan_to_num(part.reshape(wide, -1)[:, columns]) for part in (self.std_, self.mean_))
        slopes = weights / np.where(std == 0, 1, std)
        loadings = self.loadings_[:, columns // 2, columns % 2]  # (adapters, ROUGH, FACTORS)
        shares = weights[:, :, None] * loadings  # (adapters, ROUGH, FACTORS)
        offsets = (slopes * mean).sum(1) + self.handicap_
        return Rough(columns, *(array.astype(np.float32) for array in (slopes, shares, offsets)))

    def _shortlist(self, X: NDArray[Any], factors: Array) -> NDArray[np.int64]:
        """Who might have the highest score, (queries, SHORT).

        Args:
            factors: (queries, modules, 2, FACTORS).
        """
        columns, slopes, shares, offsets = self._rough
        heard = X.reshape(*X.shape[:2], -1).take(columns, axis=2).astype(np.float32, copy=False)
        np.fmax(heard, np.float32(FLOOR), out=heard)
        there = factors.reshape(len(X), -1, factors.shape[-1])[:, columns].astype(np.float32)
        guess = np.einsum("qnk,nk->qn", np.log(heard, out=heard), slopes) - offsets
        guess -= there.reshape(len(X), -1) @ shares.reshape(len(shares), -1).T
        return np.argpartition(-guess, SHORT - 1, axis=1)[:, :SHORT]

    def judge(self, X: NDArray[Any]) -> Judged:
        """Both scores as in `PrototypeGate`, of each query's shortlist alone."""
        theirs = self._standard(X, self.landmarks_)
        columns = np.ascontiguousarray(theirs.transpose(2, 3, 0, 1))  # as a product of matrices needs it
        factors = self._factors(columns).transpose(2, 0, 1, 3)  # (queries, modules, 2, FACTORS)
        scores = np.full(X.shape[:2], -np.inf)
        best, chosen = np.empty(len(X), np.int64), np.empty((len(X), self.n_modules_, 2))
        for q, who in enumerate(self._shortlist(X, factors)):
            z = self._standard(X[q : q + 1], who)[0]  # (SHORT, modules, 2)
            specific = z - np.einsum("amvf,mvf->amv", self.loadings_[who], factors[q])
            scores[q, who] = (specific * self.filter_[who]).sum((1, 2)) - self.handicap_[who]
            best[q] = scores[q].argmax()
            chosen[q] = specific[who == best[q]][0]
        plain = scores[np.arange(len(X)), best] + self.handicap_[best]
        residual = self._residual(theirs, plain, best)
        return Judged(scores, residual, self._votes(chosen, best))


def rough_columns(parts: Array, most: int) -> NDArray[np.int64]:
    """The columns by which a few of them guess all adapters' scores best, in order.

    Each next column is the one that adds most to the scores that are covered worst so far.

    Args:
        parts: (adapters, columns) of each score, not negative; sum to 1 over columns.
    """
    known = np.zeros(len(parts))
    chosen = list[int]()
    for _ in range(min(most, parts.shape[1])):
        gains = (1 / (known + 0.02)) @ parts
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        known += parts[:, chosen[-1]]
    return np.sort(chosen)
