"""Scores in a large library: a guess for all adapters, and a score for those on a query's shortlist.

The gate's scores are linear in log responses, so they are products of arrays that are made once. Knows no
files and no models. Notation as in router/routing/gate.py; columns are pairs of a module and a view.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LARGE = 256  # adapters; only a larger library is scored by shortlists
TELLERS = 256  # adapters of a large library that tell what all respond to alike
ROUGH = 32  # columns by which a shortlist is drawn up
SHORT = 64  # adapters on a shortlist
FLOOR = 1e-6  # responses are cosines; below this they are noise


def tellers(n_adapters: int) -> NDArray[np.int64]:
    """The adapters that tell the common factor: all, or TELLERS of a large library, drawn at random.

    Not every so many, since relatives may stand at equal distances.
    """
    if n_adapters <= LARGE:
        return np.arange(n_adapters)
    return np.sort(np.random.default_rng(0).choice(n_adapters, TELLERS, replace=False))


class _Sums(NamedTuple):
    """Scores as `(slopes * log R - shares * f).sum() - offsets` over columns, in float32.

    All are 0 at a column without a prototype.
    """

    slopes: NDArray[np.float32]  # (adapters, columns)
    shares: NDArray[np.float32]  # (adapters, columns) of the common factor f
    offsets: NDArray[np.float32]  # (adapters,)


class Shortlist:
    """The scores of a fitted gate, for many adapters.

    Args:
        mean, std, loadings, weights: (adapters, modules, views) as the gate has learned them; NaN without a
            prototype, loadings 0.
        scale: (adapters,) by which the mean vote is divided.
    """

    def __init__(self, mean: Array, std: Array, loadings: Array, weights: Array, scale: Array) -> None:
        self._mean, self._std, self._loadings, self._weights = mean, std, loadings, weights
        modules = (~np.isnan(mean[..., 0])).sum(1)  # (adapters,)
        mean, std, loadings, weights = (
            np.nan_to_num(x.reshape(len(x), -1)) for x in (mean, std, loadings, weights)
        )  # (adapters, columns)
        std[std == 0] = 1
        weights /= (modules * scale)[:, None]
        parts = weights / weights.sum(1, keepdims=True)
        self._rough = rough_columns(parts, ROUGH)

        def sums(columns: Any, by: Any = 1.0) -> _Sums:
            slopes = weights[:, columns] / std[:, columns]
            offsets = (slopes * mean[:, columns]).sum(1) / by
            shares = weights[:, columns] * loadings[:, columns]
            found = slopes / np.reshape(by, (-1, 1)), shares / np.reshape(by, (-1, 1)), offsets
            return _Sums(*(x.astype(np.float32) for x in found))

        self._whole = sums(slice(None))
        # Scaled as if the rough columns were all.
        self._guess = sums(self._rough, parts[:, self._rough].sum(1).clip(1e-3))
        # The common factor is `(pulls * log R).sum() - levels` over its tellers.
        self._tellers = tellers(len(mean))
        theirs = loadings[self._tellers]  # (tellers, columns)
        pulls = theirs / (1 - theirs**2)
        pulls /= (1 + (theirs * pulls).sum(0)) * std[self._tellers]
        self._pulls = pulls.astype(np.float32)
        self._levels = (pulls * mean[self._tellers]).sum(0).astype(np.float32)  # (columns,)

    def all(self, X: NDArray[Any], parts: list[slice]) -> Array:
        """The scores of all adapters, (queries, adapters).

        Args:
            X: (queries, adapters, modules, views) responses.
            parts: the queries that are scored at a time.
        """
        sums, found = self._whole, []
        for _, flat, factors in self._flat(X, parts):
            along = np.einsum("qnk,nk->qn", _float_logs(flat), sums.slopes)
            found.append(along - factors @ sums.shares.T - sums.offsets)
        return np.concatenate(found).astype(np.float64)

    def scores_and_votes(self, X: NDArray[Any], parts: list[slice]) -> tuple[Array, Array]:
        """The scores of each query's shortlist, minus infinity elsewhere, and the votes of the best.

        Args:
            X, parts: as in `all`.

        Returns:
            (queries, adapters), (queries, modules).
        """
        whole, guess = self._whole, self._guess
        found, votes = np.full(X.shape[:2], -np.inf), np.empty((len(X), X.shape[2]))
        for part, flat, factors in self._flat(X, parts):
            rows = np.arange(len(flat))[:, None]
            guessed = np.einsum("qnk,nk->qn", _float_logs(flat[:, :, self._rough]), guess.slopes)
            guessed -= factors[:, self._rough] @ guess.shares.T + guess.offsets
            who = np.argpartition(-guessed, SHORT - 1, axis=1)[:, :SHORT]  # (queries, SHORT)
            along = np.einsum("qsk,qsk->qs", _float_logs(flat[rows, who]), whole.slopes[who])
            along -= np.einsum("qsk,qk->qs", whole.shares[who], factors)
            found[part][rows, who] = along - whole.offsets[who]
            best = found[part].argmax(1)
            logs = np.log(X[part][rows[:, 0], best].astype(np.float64).clip(FLOOR))  # (q, modules, views)
            z = (logs - self._mean[best]) / self._std[best]
            less = self._loadings[best] * factors.reshape(z.shape)
            votes[part] = ((z - less) * self._weights[best]).sum(-1)
        return found, votes

    def _flat(
        self, X: NDArray[Any], parts: list[slice]
    ) -> Iterator[tuple[slice, NDArray[Any], NDArray[np.float32]]]:
        """Some queries at a time: their responses, (q, adapters, columns), and factors, (q, columns)."""
        for part in parts:
            flat = X[part].reshape(-1, *self._whole.slopes.shape)
            logs = _float_logs(flat[:, self._tellers])
            yield part, flat, np.asarray(np.einsum("qtk,tk->qk", logs, self._pulls) - self._levels)


def rough_columns(parts: Array, most: int) -> NDArray[np.int64]:
    """The columns by which a few of them guess all adapters' scores best, in order.

    Each is the one that makes most of the scores of which those before it make least.

    Args:
        parts: (adapters, columns) of each score, not negative; sum to 1 over columns.
    """
    known, chosen = np.zeros(len(parts)), list[int]()
    for _ in range(min(most, parts.shape[1])):
        gains = (1 / (known + 0.02)) @ parts
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        known += parts[:, chosen[-1]]
    return np.sort(chosen)


def _float_logs(X: NDArray[Any]) -> NDArray[np.float32]:
    """Log responses in float32, of some value without a prototype."""
    heard = np.fmax(X, np.float32(FLOOR), dtype=np.float32)
    np.minimum(heard, np.float32(1 / FLOOR), out=heard)
    return np.asarray(np.log(heard, out=heard))
