"""From responses and trials to weights: a scikit-learn estimator on plain arrays.

Knows no files and no models, so it serves any base model whose responses somebody has measured.
Notation: response R[q, i, m] of query q, adapter i, module m; reference queries are generic text
that no adapter was made for.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import norm
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

Array = NDArray[np.float64]
_HIGHEST = 0.97  # loading: an adapter is never all common factor
_STEPS = 50  # of the iteration for loadings, enough to change nothing that matters any more
_AT_ONCE = 16  # queries
_FLOOR = 1e-6  # responses are cosines; below this they are noise


class Trials(NamedTuple):
    """What adapters did when they were tried at the end of queries; NaN where one was not tried."""

    effect: Array  # (queries, adapters) relative change of the last token's final hidden state, above 0
    confidence: Array  # (queries, adapters) log-probability, nats, of the likeliest next token
    base_confidence: Array  # (queries,) the same of the base model


class PrototypeGate(BaseEstimator):  # type: ignore[misc]
    """Soft weights over the adapters and the base model.

    `fit` learns how adapters respond to generic text. A query's responses are standardised against
    it, adapter by adapter and module by module: `z = (log R - mean) / std`. What adapters feel alike
    at a module, because the query is unlike generic text as such, is taken out. It is the factor f
    of a one-factor model of generic text, `z_i = l_i f + e_i`, estimated from all adapters (Thomson's
    regression scores); an adapter that has no part in it, such as a random one, changes nothing. The
    rest, `z_i - l_i f`, is averaged over each adapter's modules and standardised again: the score.

    Adapters less than `reach` behind the best, at most `max_shortlist` of them, are on the shortlist and may
    be tried on the query. Trials are standardised against trials on generic text: effect (its logarithm) and
    confidence. An adapter's score rises by its confidence, by `reach` at most, and never falls.

    The base model is a candidate too, with the score that the best of n adapters reaches by chance as
    often as not: a query that stands out no more than that belongs to no adapter. The level is the
    median of the largest of n normal scores, not of the generic texts' best, some of which may well be
    an adapter's own. After trials it is also level with the best adapter where its own confidence
    is as unusual as that adapter's effect: it knows an answer, and the adapter adds nothing of note.

    Args:
        temperature: of the softmax over scores, in standard deviations of generic text, above 0.
        top_k: at most this many adapters keep a weight, at least 1; None keeps all.
        reach: how far a trial can raise a score, in standard deviations of generic text, and so how far
            behind the best an adapter may be and still be on the shortlist.
        max_shortlist: at most this many adapters are tried on a query; each costs a pass over it.
        chance: probability that the best of n adapters reaches the base model's score on text that belongs
            to none of them.

    Attributes:
        mean_, std_: (adapters, modules) of the log response over the reference queries.
        loadings_: (adapters, modules) of the common factor, in [0, 1); 0 without a prototype.
        location_, scale_: (adapters,) of the score averaged over modules.
        base_score_: score of the base model.
        effect_, confidence_: (2, adapters) mean and deviation in the reference trials.
        base_confidence_: (2,) the same of the base model.

    Example:
        >>> draws = np.random.default_rng(0)
        >>> generic = draws.lognormal(-3, 0.3, (50, 2, 4))  # 50 generic texts, 2 adapters, 4 modules
        >>> queries = generic[:2].copy()
        >>> queries[0, 0] *= 3  # the first query excites the first adapter
        >>> gate = PrototypeGate().fit(generic)
        >>> gate.predict(queries)  # 2 is the base model
        array([0, 2])
        >>> gate.predict_proba(queries).sum(1)
        array([1., 1.])
    """

    def __init__(
        self,
        temperature: float = 0.2,
        top_k: int | None = 3,
        reach: float = 1.5,
        max_shortlist: int = 3,
        chance: float = 0.5,
    ) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.reach = reach
        self.max_shortlist = max_shortlist
        self.chance = chance

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Learns the reference from responses to generic text.

        Args:
            X: (reference queries, adapters, modules) responses, NaN where an adapter has no
                prototype; at least 2 reference queries.
            y: ignored.

        Raises:
            ValueError: wrong shape, or an adapter without any prototype.
        """
        X = _three_dimensional(X)
        if len(X) < 2:
            raise ValueError(f"expected at least 2 reference queries, got {len(X)}")
        if not X.shape[1]:
            raise ValueError("expected at least 1 adapter, got none")
        absent = np.isnan(_logs(X[:1])[0])  # (adapters, modules)
        means, stds, loadings = np.empty((3, *X.shape[1:]))
        for m in range(X.shape[2]):  # one at a time: of many adapters, all of them would fill the memory
            logs = _logs(X[:, :, [m]])
            self._check_absent(logs, absent[:, [m]])
            one = logs[:, :, 0]  # (reference queries, adapters)
            means[:, m], stds[:, m] = one.mean(0), one.std(0, ddof=1).clip(1e-3)
            loadings[:, m] = _loadings((one - means[:, m]) / stds[:, m])
        if (empty := absent.all(1)).any():
            raise ValueError(f"adapters {np.flatnonzero(empty).tolist()} have no prototype at any module")
        self.n_adapters_, self.n_modules_ = X.shape[1:]
        self.mean_, self.std_, self.loadings_ = means, stds, loadings
        for name in ("effect_", "confidence_", "base_confidence_"):  # of another library, if there are any
            self.__dict__.pop(name, None)
        raw = np.concatenate([self._average(_logs(x)) for x in _parts(X)])
        self.location_, self.scale_ = raw.mean(0), raw.std(0, ddof=1).clip(1e-6)
        self.base_score_ = float(norm.ppf((1 - self.chance) ** (1 / self.n_adapters_)))
        return self

    @staticmethod
    def _check_absent(logs: Array, absent: NDArray[np.bool_]) -> None:
        """Refuses values that are not finite where an adapter has a prototype, and any where it has none."""
        if np.isinf(logs).any() or (np.isnan(logs) != absent).any():
            raise ValueError(
                "expected finite responses, NaN at the same adapters and modules for all queries: "
                "those without a prototype"
            )

    def fit_trials(self, trials: Trials) -> Self:
        """Learns what adapters do at the end of generic text.

        Args:
            trials: on at least 2 reference queries; NaN for adapters that will not be tried.
        """
        if len(trials.base_confidence) < 2:
            raise ValueError(f"expected at least 2 reference trials, got {len(trials.base_confidence)}")
        self.effect_ = _moments(np.log(trials.effect.clip(_FLOOR)))
        self.confidence_ = _moments(trials.confidence)
        self.base_confidence_ = _moments(trials.base_confidence)
        return self

    def _standardised(self, logs: Array) -> Array:
        """Standardised responses less what is common, (queries, adapters, modules)."""
        z: Array = (logs - self.mean_) / self.std_
        weights = self.loadings_ / (1 - self.loadings_**2)
        factor = (np.nan_to_num(z) * weights).sum(1) / (1 + (self.loadings_ * weights).sum(0))
        return np.asarray(z - self.loadings_ * factor[:, None])

    def _average(self, logs: Array) -> Array:
        """The same averaged over modules, (queries, adapters)."""
        return _nanmean(self._standardised(logs), 2)

    def votes(self, X: ArrayLike, scores: Array) -> Array:
        """The best adapter's standardised responses, whose mean makes its score, (queries, modules)."""
        best = scores.argmax(1)
        found = [
            self._standardised(_logs(x))[np.arange(len(who)), who]
            for x, who in zip(_parts(X), _parts(best), strict=True)
        ]
        return np.concatenate(found) if found else np.empty((0, self.n_modules_))

    def standard_trials(self, trials: Trials) -> Trials:
        """Trials in standard deviations of generic text; the effect's are those of its logarithm."""
        check_is_fitted(self, "effect_")
        return Trials(
            (np.log(trials.effect.clip(_FLOOR)) - self.effect_[0]) / self.effect_[1],
            (trials.confidence - self.confidence_[0]) / self.confidence_[1],
            (trials.base_confidence - self.base_confidence_[0]) / self.base_confidence_[1],
        )

    def decision_function(self, X: ArrayLike) -> Array:
        """Calibrated scores, (queries, adapters), in standard deviations of generic text."""
        check_is_fitted(self)
        found = np.empty((len(np.asarray(X)), self.n_adapters_))
        for x, place in zip(_parts(X), _parts(found), strict=True):
            logs = _logs(x)
            if logs.shape[1:] != (self.n_adapters_, self.n_modules_):
                raise ValueError(
                    f"expected responses of {self.n_adapters_} adapters at {self.n_modules_} modules, "
                    f"got {logs.shape[1]} and {logs.shape[2]}"
                )
            self._check_absent(logs, np.isnan(self.mean_))
            place[:] = (self._average(logs) - self.location_) / self.scale_
        return found

    def shortlist(self, scores: Array) -> NDArray[np.bool_]:
        """The adapters that a trial could put first, (queries, adapters), at most `max_shortlist` a query.

        Args:
            scores: what `decision_function` found, (queries, adapters).
        """
        best = np.maximum(scores.max(1, keepdims=True), self.base_score_)
        ranks = (-scores).argsort(1, kind="stable").argsort(1)
        return np.asarray((scores > best - self.reach) & (ranks < self.max_shortlist))

    def candidate_scores(self, scores: Array, trials: Trials | None = None) -> Array:
        """Scores of the adapters and, last, the base model, (queries, adapters + 1).

        With trials, an adapter that was not tried has minus infinity.

        Args:
            scores: what `decision_function` found, (queries, adapters).
            trials: of the adapters on the shortlist.
        """
        base = np.full(len(scores), self.base_score_)
        if trials is not None:
            effect, sure, base_sure = self.standard_trials(trials)
            tried = ~np.isnan(sure)
            scores = np.where(tried, scores + sure.clip(0, self.reach), -np.inf)
            some, rows = tried.any(1), np.arange(len(scores))
            best = scores.argmax(1)
            level = scores[rows, best] + base_sure - effect[rows, best]
            base = np.where(some, np.fmax(base, level), base)
        return np.column_stack([scores, base])

    def weights(self, candidates: Array) -> Array:
        """The softmax of the candidates' scores, in which at most `top_k` adapters keep a weight.

        Args:
            candidates: (queries, adapters + 1), the base model last; minus infinity for one that is out.

        Returns:
            (queries, adapters + 1); rows sum to 1.

        Raises:
            ValueError: temperature or top_k out of their range.
        """
        if not self.temperature > 0:
            raise ValueError(f"expected a temperature above 0, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"expected top_k of at least 1 or None, got {self.top_k}")
        weights = np.exp((candidates - candidates.max(1, keepdims=True)) / self.temperature)
        if self.top_k is not None:
            ranks = (-weights[:, :-1]).argsort(1, kind="stable").argsort(1)
            weights[:, :-1][ranks >= self.top_k] = 0.0
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def predict_proba(self, X: ArrayLike, trials: Trials | None = None) -> Array:
        """Weights, (queries, adapters + 1); rows sum to 1, the last column is the base model."""
        return self.weights(self.candidate_scores(self.decision_function(X), trials))

    def predict(self, X: ArrayLike, trials: Trials | None = None) -> NDArray[np.int64]:
        """The heaviest candidate of each query; the number of adapters means the base model."""
        return np.asarray(self.predict_proba(X, trials).argmax(1))


def _loadings(z: Array) -> Array:
    """Loadings of one common factor at a module, (adapters,), by principal axes.

    Negative correlations count as none, so the factor is something that adapters share and loadings
    are not negative. Two adapters have the root of their correlation, one alone has 0.

    Args:
        z: (queries, adapters) standardised, NaN without a prototype.
    """
    filled, there = np.nan_to_num(z), ~np.isnan(z[0])
    correlation = (filled.T @ filled).clip(0) / (len(z) - 1)
    axis = there / np.sqrt(max(1, there.sum()))
    loadings = np.sqrt(0.5) * there
    for _ in range(_STEPS):
        np.fill_diagonal(correlation, loadings**2)
        axis = correlation @ axis
        size = max(float(np.linalg.norm(axis)), 1e-12)
        axis /= size
        loadings = (np.sqrt(size) * axis).clip(0, _HIGHEST)
    return np.asarray(loadings)


def _moments(values: Array) -> Array:
    """Mean and standard deviation over the first axis, (2, ...); the deviation at least 1e-3."""
    return np.stack([values.mean(0), values.std(0, ddof=1).clip(1e-3)])


def _nanmean(values: Array, axis: int) -> Array:
    """Mean over an axis without NaN; NaN, and no warning, where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean: Array = np.nanmean(values, axis=axis)
    return mean


def _parts(X: ArrayLike) -> list[Any]:
    """Some queries at a time: responses to many queries of many adapters are large, and float64 is larger."""
    X = np.asarray(X)
    return [X[start : start + _AT_ONCE] for start in range(0, len(X), _AT_ONCE)]


def _three_dimensional(X: ArrayLike) -> NDArray[Any]:
    X = np.asarray(X)
    if X.ndim != 3:
        raise ValueError(f"expected responses of shape (queries, adapters, modules), got {X.ndim} dimensions")
    return X


def _logs(X: ArrayLike) -> Array:
    logs: Array = np.log(np.asarray(_three_dimensional(X), dtype=np.float64).clip(_FLOOR))
    return logs
