"""From responses to weights: a scikit-learn estimator on plain arrays.

Knows no files and no models, so it serves any base model whose responses somebody has measured.
Notation: response R[q, i, m] of query q, adapter i, module m; reference queries are generic text
that no adapter was made for.
"""

from __future__ import annotations

import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

Array = NDArray[np.float64]
CHANCE = 0.5  # of the best of n adapters to reach the base model's score on text that is none's own
_FLOOR = 1e-6  # responses are cosines; below this they are noise


class PrototypeGate(BaseEstimator):  # type: ignore[misc]
    """Soft weights over the adapters and the base model.

    `fit` learns how adapters respond to generic text. A query's responses are standardised against
    it, adapter by adapter and module by module: `z = (log R - mean) / std`. What all adapters feel
    alike at a module, because the query is unlike generic text as such, is taken out; it is
    estimated from their mean as in a random-effects model, `c = n rho / (1 + (n - 1) rho) * mean_i z`,
    with rho the correlation of two adapters' z over generic text. The rest is averaged over each
    adapter's modules and standardised again: the score.

    The base model is a candidate too, with the score that the best of n adapters reaches by chance as
    often as not: a query that stands out no more than that belongs to no adapter. The level is the
    median of the largest of n normal scores, not of the generic texts' best, some of which may well be
    an adapter's own.

    Args:
        temperature: of the softmax over scores, in standard deviations of generic text, above 0.
        top_k: at most this many adapters keep a weight, at least 1; None keeps all.

    Attributes:
        mean_, std_: (adapters, modules) of the log response over the reference queries.
        common_: (modules,) factor of the adapters' mean that is taken out.
        location_, scale_: (adapters,) of the score averaged over modules.
        base_score_: score of the base model.
    """

    def __init__(self, temperature: float = 0.5, top_k: int | None = 3) -> None:
        self.temperature = temperature
        self.top_k = top_k

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Learns the reference from responses to generic text.

        Args:
            X: (reference queries, adapters, modules) responses, NaN where an adapter has no
                prototype; at least 2 reference queries.
            y: ignored.

        Raises:
            ValueError: wrong shape, or an adapter without any prototype.
        """
        logs = _logs(X)
        if len(logs) < 2:
            raise ValueError(f"expected at least 2 reference queries, got {len(logs)}")
        if (empty := np.isnan(logs).all(axis=(0, 2))).any():
            raise ValueError(f"adapters {np.flatnonzero(empty).tolist()} have no prototype at any module")
        self.n_adapters_, self.n_modules_ = logs.shape[1:]
        self.mean_ = logs.mean(0)
        self.std_ = logs.std(0, ddof=1).clip(1e-3)
        self.common_ = _common_factor((logs - self.mean_) / self.std_)
        raw = self._average(logs)
        self.location_, self.scale_ = raw.mean(0), raw.std(0, ddof=1).clip(1e-6)
        self.base_score_ = float(norm.ppf((1 - CHANCE) ** (1 / self.n_adapters_)))
        return self

    def _average(self, logs: Array) -> Array:
        """Standardised responses less what is common, averaged over modules, (queries, adapters)."""
        z = (logs - self.mean_) / self.std_
        z -= self.common_ * _nanmean(z, 1)[:, None]
        return _nanmean(z, 2)

    def decision_function(self, X: ArrayLike) -> Array:
        """Calibrated scores, (queries, adapters), in standard deviations of generic text."""
        check_is_fitted(self)
        logs = _logs(X)
        if logs.shape[1:] != (self.n_adapters_, self.n_modules_):
            raise ValueError(
                f"expected responses of {self.n_adapters_} adapters at {self.n_modules_} modules, "
                f"got {logs.shape[1]} and {logs.shape[2]}"
            )
        scores: Array = (self._average(logs) - self.location_) / self.scale_
        return scores

    def predict_proba(self, X: ArrayLike) -> Array:
        """Weights, (queries, adapters + 1); rows sum to 1, the last column is the base model."""
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")
        scores = self.decision_function(X)
        scores = np.column_stack([scores, np.full(len(scores), self.base_score_)])
        weights = np.exp((scores - scores.max(1, keepdims=True)) / self.temperature)
        if self.top_k is not None:
            ranks = (-weights[:, :-1]).argsort(1, kind="stable").argsort(1)
            weights[:, :-1][ranks >= self.top_k] = 0.0
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def predict(self, X: ArrayLike) -> NDArray[np.int64]:
        """The heaviest candidate of each query; the number of adapters means the base model."""
        return np.asarray(self.predict_proba(X).argmax(1))


def _common_factor(z: Array) -> Array:
    """n rho / (1 + (n - 1) rho) per module, from z (queries, adapters, modules); 0 where n < 2.

    rho is the mean correlation of two adapters, from the variance of their mean:
    `var(mean) = (1 + (n - 1) rho) / n` for n unit variances.
    """
    n = (~np.isnan(z[0])).sum(0)  # (modules,) adapters with a prototype
    spread = _nanmean(z, 1).var(0, ddof=1) * n  # (modules,) 1 + (n - 1) rho
    rho = ((spread - 1) / np.maximum(n - 1, 1)).clip(0, 1)
    factor: Array = np.where(n > 1, n * rho / (1 + (n - 1) * rho), 0.0)
    return factor


def _nanmean(values: Array, axis: int) -> Array:
    """Mean over an axis without NaN; NaN, and no warning, where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean: Array = np.nanmean(values, axis=axis)
    return mean


def _logs(X: ArrayLike) -> Array:
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 3:
        raise ValueError(f"expected responses of shape (queries, adapters, modules), got {X.ndim} dimensions")
    logs: Array = np.log(X.clip(_FLOOR))
    return logs
