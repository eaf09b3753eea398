"""From responses to weights: a scikit-learn estimator on plain arrays.

It knows no files and no models, so it serves any base model whose responses somebody has measured.
Notation: R[q, i, m, v] is the response of query q, adapter i, module m in view v: 0 over the whole prompt,
1 over its end. Reference queries are generic text, task-like prompts that no adapter was made for.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from router.routing import shortlist
from router.routing.evidence import comparable
from router.routing.shortlist import FLOOR, Shortlist, tellers

Array = NDArray[np.float64]
FOLDS = 5  # of the cross-validation that places the base model's score
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # false alarms that are shown side by side
TAIL = 0.2  # share of the reference queries that an exponential tail is fitted to
_HIGHEST = 0.97  # loading: an adapter is never all common factor
_FARTHEST = 2.0  # reach: an adapter that was made to have little of it gains no more than this
_STEPS = 50  # of the iteration for loadings; more change no choice on the libraries that were measured
_ENTRIES = 1 << 22  # numbers in the arrays of several modules that are fitted at once
_AT_ONCE = 16  # queries


class PrototypeGate(BaseEstimator):  # type: ignore[misc]
    """Soft weights over the adapters and the base model.

    `fit` learns how adapters respond to generic text. A query's responses are standardised against it,
    adapter by adapter, module by module and view by view: `z = (log R - mean) / std`. What all adapters
    respond to alike, because the query is unlike generic text as such, is taken out. It is the factor f of a
    one-factor model of generic text, `z_i = l_i f + e_i`, estimated from all adapters (Thomson's regression
    scores); an adapter that has no part in it, such as a random one, changes nothing. The rest,
    `z_i - l_i f`, is averaged over an adapter's modules and views with the weights of a matched filter, and
    standardised again: the score. A query of the adapter is taken to add the same to every `R^2`, which
    raises `log R` by a share of `1 / R^2`, so the weights are `1 / (exp(2 mean) std)`: what is small and
    steady on generic text says most.

    The base model is a candidate too. Its score is a level plus its own confidence of the next token,
    standardised on generic text: where it is surer than usual, an adapter has to stand out more. The level is
    such that a share `false_alarm` of generic text still goes to an adapter. It is found by cross-validation:
    every reference query is scored by a gate that was fitted without it. Beyond the highest fifth the tail is
    taken as exponential (peaks over threshold), so that few reference queries can promise a rare false alarm.

    Several adapters may be above the base model, relatives mostly, and their scores do not compare: one that
    reads many modules can be further out on a relative's queries than the relative, which reads few. So what
    an adapter has above the base model is divided by its reach: how far out its own queries are expected. By
    the filter's own model that is in proportion to `sum(filter (1 - l_i^2) / (exp(2 mean) std))`. Whether any
    adapter is above the base model does not depend on it.

    Of more than 256 adapters only a shortlist gets scores (router/routing/shortlist.py). As many, drawn at
    random, tell the common factor; the others' loadings follow from their correlations with these (Nystrom).
    A few pairs of a module and a view, which make up much of each adapter's score, say who is on a query's
    shortlist. These get their scores as above, but in float32. The others have minus infinity.

    Args:
        temperature: of the softmax over scores, in standard deviations of generic text, above 0.
        top_k: at most this many adapters keep a weight, at least 1; None keeps all.
        false_alarm: share of text that belongs to no adapter and may still be sent to one, in (0, 1).

    Attributes:
        mean_, std_: (adapters, modules, views) of the log response over the reference queries.
        loadings_: (adapters, modules, views) of the common factor, in [0, 1); 0 without a prototype.
        filter_: (adapters, modules, views) weights in the score; their sum over views is 1 on average over an
            adapter's modules.
        scale_: (adapters,) deviation of an adapter's mean vote, whose mean is 0, over the reference queries.
        reach_: (adapters,) how far above the base model an adapter's own queries are expected, relative to
            the other adapters, in [0.5, 2].
        confidence_: (2,) mean and deviation of the base model's confidence over the reference queries.
        reference_leads_: (reference queries,) cross-validated score of the best adapter, less the base
            model's standardised confidence.
        level_: score of the base model where its confidence is as usual.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> generic = rng.uniform(0.1, 0.2, (40, 3, 5, 2))  # 40 prompts, 3 adapters, 5 modules
        >>> gate = PrototypeGate(false_alarm=0.1).fit(generic)
        >>> query = generic[:1].copy()
        >>> query[:, 1] *= 2  # the second adapter responds twice as strongly
        >>> gate.predict(query).tolist()
        [1]
    """

    def __init__(
        self,
        temperature: float = 0.7,
        top_k: int | None = 3,
        false_alarm: float = 0.2,
    ) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.false_alarm = false_alarm

    def fit(self, X: ArrayLike, y: Any = None, confidence: ArrayLike | None = None) -> Self:
        """Learns the reference from responses to generic text.

        Args:
            X: (reference queries, adapters, modules, 2) responses, NaN where an adapter has no
                prototype; at least 4 reference queries.
            y: ignored.
            confidence: (reference queries,) of the base model: log-probability, in nats, of the likeliest
                next token; None leaves it out.

        Raises:
            ValueError: wrong shape, a parameter out of its range, or an adapter without any prototype.
        """
        X = _four_dimensional(X)
        if len(X) < 4:
            raise ValueError(f"expected at least 4 reference queries, got {len(X)}")
        if not X.shape[1]:
            raise ValueError("expected at least 1 adapter, got none")
        if not 0 < self.false_alarm < 1:
            raise ValueError(f"expected a false_alarm between 0 and 1, got {self.false_alarm}")
        self._check(X, np.isnan(_logs(X[:1])[0]))
        held = np.empty(len(X))
        folds = min(FOLDS, len(X) // 2)
        for fold in range(folds):
            out = np.arange(len(X)) % folds == fold
            held[out] = self._learn(X[~out])._scores(X[out]).max(1)
        self._learn(X)
        sure = np.zeros(len(X)) if confidence is None else _confidences(confidence, len(X))
        self.confidence_ = np.array([sure.mean(), max(sure.std(ddof=1), 1e-3)])
        self.reference_leads_ = held - self._standard(confidence, len(X))
        self.level_ = level(self.reference_leads_, self.false_alarm)
        return self

    def _standard(self, confidence: ArrayLike | None, n_queries: int) -> Array:
        """The base model's confidence in standard deviations of generic text, (queries,)."""
        if confidence is None:
            return np.zeros(n_queries)
        found = (_confidences(confidence, n_queries) - self.confidence_[0]) / self.confidence_[1]
        return np.asarray(found)

    def _learn(self, X: NDArray[Any]) -> Self:
        """Learns means, deviations, loadings and the scale of the scores."""
        flat = X.reshape(*X.shape[:2], -1)  # (reference queries, adapters, modules * views)
        means, stds, loadings = np.empty((3, *flat.shape[1:]))
        telling = tellers(flat.shape[1])
        some = max(1, _ENTRIES // (flat.shape[1] * max(len(flat), len(telling))))
        for start in range(0, flat.shape[2], some):  # of many adapters, all at once would fill the memory
            part = slice(start, start + some)
            logs = _logs(flat[:, :, part])
            means[:, part], stds[:, part] = logs.mean(0), logs.std(0, ddof=1).clip(1e-3)
            z = ((logs - means[:, part]) / stds[:, part]).transpose(2, 0, 1)
            loadings[:, part] = _loadings(z, telling).T
        means, stds, loadings = (of.reshape(X.shape[1:]) for of in (means, stds, loadings))
        if (empty := np.isnan(means).all((1, 2))).any():
            raise ValueError(f"adapters {np.flatnonzero(empty).tolist()} have no prototype at any module")
        self.n_adapters_, self.n_modules_ = X.shape[1:3]
        self.mean_, self.std_, self.loadings_ = means, stds, loadings
        matched = _matched(means, stds)
        self.filter_ = matched / _nanmean(matched.sum(2), 1)[:, None, None]
        if self.shortlists:
            raw = Shortlist(means, stds, loadings, self.filter_, np.ones(len(means))).all(X, _parts(X))
        else:
            raw = np.concatenate([_nanmean(self._votes(X[part]), 2) for part in _parts(X)])
        self.scale_ = raw.std(0, ddof=1).clip(1e-6)
        shift = _nanmean((self.filter_ * matched * (1 - loadings**2)).sum(2), 1) / self.scale_
        self.reach_ = (shift / np.exp(np.log(shift).mean())).clip(1 / _FARTHEST, _FARTHEST)
        self.__dict__.pop("_shortlist", None)
        return self

    @property
    def shortlists(self) -> bool:
        """Whether there are so many adapters that only a shortlist of them gets scores."""
        return len(self.mean_) > shortlist.LARGE

    @cached_property
    def _shortlist(self) -> Shortlist:
        return Shortlist(self.mean_, self.std_, self.loadings_, self.filter_, self.scale_)

    @staticmethod
    def _check(X: NDArray[Any], absent: NDArray[np.bool_]) -> None:
        """Refuses values that are not finite where an adapter has a prototype, and finite ones elsewhere."""
        found = np.empty(absent.shape, bool)  # used again and again, since a large one takes time to get
        for row in X if X.dtype.kind == "f" else X.astype(np.float64):
            if np.equal(np.isfinite(row, out=found), absent, out=found).any():
                raise ValueError(
                    "expected finite responses, NaN at the same adapters and modules for all queries: "
                    "those without a prototype"
                )

    def _votes(self, X: ArrayLike) -> Array:
        """Standardised responses less what is common, filtered over views, (queries, adapters, modules)."""
        z: Array = (_logs(X) - self.mean_) / self.std_
        weights = self.loadings_ / (1 - self.loadings_**2)
        factor = (np.nan_to_num(z) * weights).sum(1) / (1 + (self.loadings_ * weights).sum(0))
        return np.asarray(((z - self.loadings_ * factor[:, None]) * self.filter_).sum(-1))

    def _scores(self, X: NDArray[Any]) -> Array:
        if self.shortlists:
            return self._shortlist.scores_and_votes(X, _parts(X))[0]
        found = [_nanmean(self._votes(X[part]), 2) for part in _parts(X)]
        raw = np.concatenate(found) if found else np.empty((0, self.n_adapters_))
        return np.asarray(raw / self.scale_)

    def votes(self, X: ArrayLike, scores: Array) -> Array:
        """The best adapter's filtered responses, (queries, modules); their mean by `scale_` is its score."""
        X, best = np.asarray(X), scores.argmax(1)
        if self.shortlists:
            return self._shortlist.scores_and_votes(X, _parts(X))[1]
        found = [self._votes(X[part])[np.arange(len(best[part])), best[part]] for part in _parts(X)]
        return np.concatenate(found) if found else np.empty((0, self.n_modules_))

    def scores_and_votes(self, X: NDArray[Any]) -> tuple[Array, Array]:
        """What `decision_function` and `votes` find, of responses that are known to be finite.

        Of many adapters, looking whether they are takes as long as scoring.
        """
        if self.shortlists:
            return self._shortlist.scores_and_votes(X, _parts(X))
        scores = self._scores(X)
        return scores, self.votes(X, scores)

    def decision_function(self, X: ArrayLike) -> Array:
        """Calibrated scores, (queries, adapters), in standard deviations of generic text."""
        check_is_fitted(self)
        X = _four_dimensional(X)
        if X.shape[1:] != self.mean_.shape:
            raise ValueError(
                f"expected responses of {self.n_adapters_} adapters at {self.n_modules_} modules, "
                f"got {X.shape[1]} and {X.shape[2]}"
            )
        self._check(X, np.isnan(self.mean_))
        return self._scores(X)

    def candidate_scores(self, scores: Array, confidence: ArrayLike | None = None) -> Array:
        """What the choice is made by: scores that compare, (queries, adapters + 1), the base model last.

        Args:
            scores: what `decision_function` found, (queries, adapters).
            confidence: (queries,) of the base model, as in `fit`.
        """
        check_is_fitted(self)
        base = self.level_ + self._standard(confidence, len(scores))[:, None]
        return comparable(scores, base, self.reach_)

    def levels(self) -> dict[str, float]:
        """What each of SHARES, and the gate's own `false_alarm`, would add to the base model's score."""
        check_is_fitted(self)
        shares = sorted({*SHARES, self.false_alarm})
        return {f"{share:g}": level(self.reference_leads_, share) - self.level_ for share in shares}

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
        if self.top_k is not None and self.top_k < weights.shape[1] - 1:
            left, rows = weights[:, :-1].copy(), np.arange(len(weights))
            weights[:, :-1] = 0.0
            for _ in range(self.top_k):  # of equal ones the first; sorting thousands takes longer
                best = left.argmax(1)
                weights[rows, best], left[rows, best] = left[rows, best], -1.0
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def predict_proba(self, X: ArrayLike, confidence: ArrayLike | None = None) -> Array:
        """Weights, (queries, adapters + 1); rows sum to 1, the last column is the base model."""
        return self.weights(self.candidate_scores(self.decision_function(X), confidence))

    def predict(self, X: ArrayLike, confidence: ArrayLike | None = None) -> NDArray[np.int64]:
        """The top candidate of each query; the number of adapters means the base model."""
        return np.asarray(self.predict_proba(X, confidence).argmax(1))


def level(scores: Array, false_alarm: float) -> float:
    """The level that a share `false_alarm` of such scores exceeds.

    Up to a share of TAIL it is read off the scores. A rarer one is read off the exponential that has the mean
    excess of the highest scores: generalised Pareto with shape 0 (Pickands 1975).

    Args:
        scores: (n,) of text that belongs to no adapter.
        false_alarm: in (0, 1).

    Example:
        >>> level(np.arange(101.0), 0.5)
        50.0
    """
    start = float(np.quantile(scores, 1 - max(TAIL, false_alarm)))
    if false_alarm >= TAIL or not (scores > start).any():
        return start
    excess = float((scores[scores > start] - start).mean())
    return start + excess * float(np.log(TAIL / false_alarm))


def _matched(means: Array, stds: Array) -> Array:
    """The matched filter in any unit, (adapters, modules, views), NaN without a prototype.

    A module with no response to generic text has no weight: what there is is rounding. Neither energy nor
    deviation counts as less than a tenth of the adapter's median.
    """
    energy = np.exp(2 * means)
    low = [np.nanmedian(of.reshape(len(of), -1), 1)[:, None, None] / 10 for of in (energy, stds)]
    weights = 1 / (np.maximum(energy, low[0]) * np.maximum(stds, low[1]))
    heard = means > np.log(10 * FLOOR)
    heard |= ~heard.any((1, 2), keepdims=True)  # an adapter that is silent everywhere
    return np.where(np.isnan(means), np.nan, weights * heard)


def _loadings(z: Array, telling: NDArray[np.int64]) -> Array:
    """Loadings of one common factor at each of several modules, (modules, adapters), from its tellers.

    Another adapter's loading is what one of theirs would be that correlates with them as it does: at a fixed
    point of `_axes`, `l_i |l|^2 = sum_j r_ij l_j` with l_i^2 in place of r_ii.
    """
    if len(telling) == z.shape[2]:
        return _axes(z)
    filled = np.nan_to_num(z)
    theirs = _axes(z[:, :, telling])
    correlation = (filled.transpose(0, 2, 1) @ filled[:, :, telling]).clip(0) / (z.shape[1] - 1)
    sizes = np.square(theirs).sum(1, keepdims=True).clip(1e-12)
    found = ((correlation @ theirs[:, :, None])[:, :, 0] / sizes).clip(0, _HIGHEST)
    found[:, telling] = theirs
    return np.asarray(found)


def _axes(z: Array) -> Array:
    """Loadings of one common factor at each of several modules, (modules, adapters), by principal axes.

    Negative correlations count as none, so the factor is something that adapters share and loadings
    are not negative. Two adapters have the root of their correlation, one alone has 0.

    Args:
        z: (modules, queries, adapters) standardised, NaN without a prototype.
    """
    filled, there = np.nan_to_num(z), ~np.isnan(z[:, 0])
    correlation = (filled.transpose(0, 2, 1) @ filled).clip(0) / (z.shape[1] - 1)  # (modules, n, n)
    axis = there / np.sqrt(there.sum(1, keepdims=True).clip(1))
    loadings = np.sqrt(0.5) * there
    diagonal = np.arange(z.shape[2])
    for _ in range(_STEPS):
        correlation[:, diagonal, diagonal] = loadings**2
        axis = (correlation @ axis[:, :, None])[:, :, 0]
        size = np.linalg.norm(axis, axis=1, keepdims=True).clip(1e-12)
        axis /= size
        loadings = (np.sqrt(size) * axis).clip(max=_HIGHEST)
    return np.asarray(loadings)


def _nanmean(values: Array, axis: int) -> Array:
    """Mean over an axis without NaN; NaN, and no warning, where nothing is left."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        mean: Array = np.nanmean(values, axis=axis)
    return mean


def _parts(X: NDArray[Any]) -> list[slice]:
    """Some queries at a time: responses to many queries of many adapters are large, and float64 is larger."""
    some = max(1, min(_AT_ONCE, _ENTRIES // max(1, X[:1].size)))
    return [slice(start, start + some) for start in range(0, len(X), some)]


def _confidences(values: ArrayLike, n_queries: int) -> Array:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (n_queries,) or not np.isfinite(found).all():
        raise ValueError(f"expected {n_queries} finite confidences, got an array of shape {found.shape}")
    return found


def _four_dimensional(X: ArrayLike) -> NDArray[Any]:
    X = np.asarray(X)
    if X.ndim != 4 or X.shape[3] != 2:
        raise ValueError(f"expected responses of shape (queries, adapters, modules, 2), got {X.shape}")
    return X


def _logs(X: ArrayLike) -> Array:
    logs: Array = np.log(np.asarray(X, dtype=np.float64).clip(FLOOR))
    return logs
