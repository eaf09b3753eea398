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
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

Array = NDArray[np.float64]
_FLOOR = 1e-6  # responses are cosines; below this they are noise


class PrototypeGate(BaseEstimator):  # type: ignore[misc]
    """Soft weights over the adapters and the base model.

    `fit` learns what generic text makes each adapter respond, module by module; a query's score
    is how far beyond it responds, in standard deviations, averaged over the adapter's modules and
    standardised again. The base model is a candidate with the score that generic text itself
    reaches at its best adapter: a query that stands out no more than that belongs to no adapter.

    Args:
        temperature: of the softmax over scores, in standard deviations of generic text, above 0.
        top_k: at most this many adapters keep a weight, at least 1; None keeps all.

    Attributes:
        mean_, std_: (adapters, modules) of the log response over the reference queries.
        location_, scale_: (adapters,) of the score averaged over modules.
        base_score_: score of the base model.
    """

    def __init__(self, temperature: float = 1.0, top_k: int | None = 3) -> None:
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
        raw = self._average(logs)
        self.location_, self.scale_ = raw.mean(0), raw.std(0, ddof=1).clip(1e-6)
        best = ((raw - self.location_) / self.scale_).max(1)
        self.base_score_ = float(best.mean() + best.std())
        return self

    def _average(self, logs: Array) -> Array:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            mean: Array = np.nanmean((logs - self.mean_) / self.std_, axis=2)
        return mean

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


def _logs(X: ArrayLike) -> Array:
    X = np.asarray(X, dtype=np.float64)
    if X.ndim != 3:
        raise ValueError(f"expected responses of shape (queries, adapters, modules), got {X.ndim} dimensions")
    logs: Array = np.log(X.clip(_FLOOR))
    return logs
