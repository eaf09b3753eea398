"""From responses to weights: a scikit-learn estimator on plain arrays.

It knows no files and no models, so it serves any base model whose responses somebody has measured.
Notation: R[q, i, m, v] is the response of query q, adapter i, module m in view v: 0 over the whole prompt,
1 over its end. Reference queries are generic text, task-like prompts that no adapter was made for. Equations
are those of docs/method.md.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from router.constants import FALSE_POSITIVE_RATE, TEMPERATURE, TOP_K

Array = NDArray[np.float64]
FOLDS = 5  # of the cross-validation that places the threshold
SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)  # false positive rates that are shown side by side
NEARER = 3.35  # odds that generic text is sent to an adapter, against those of a query that none fits
TAIL = 0.2  # share of the reference queries that an exponential tail is fitted to
FACTORS = 16  # most directions in which adapters respond alike at a module, in a view
SHRINK = 0.3  # share of independence in the adapters' correlations
RIDGE = 1.0  # of the regression on generic text, relative to the mean of the kernel's diagonal
RESIDUAL = 0.5  # share of the residual in the lead of an adapter
DOUBT = 0.5  # share of the base model's confidence that counts against an adapter
BLOCK, WIDE = 8, 2048  # modules that are learned together; fewer where modules times adapters is above WIDE
FLOOR = 1e-6  # responses are cosines; below this they are noise


class Judged(NamedTuple):
    """The judgement of a fitted gate on queries.

    Attributes:
        scores: (queries, adapters) in standard deviations of generic text; minus infinity for one that is not
            on the query's shortlist.
        residual: (queries,) of the adapter with the highest score, in the same unit.
        votes: (queries, modules) of that adapter, whose mean is its score before a handicap; NaN without a
            prototype.
    """

    scores: Array
    residual: Array
    votes: Array


class PrototypeGate(BaseEstimator):  # type: ignore[misc]
    """Soft weights over the adapters and the base model.

    `fit` learns how adapters respond to generic text. An adapter's score (equations 2 to 4) says how far a
    query stands out from that, and chooses one adapter among all. The residual (equation 5) is what generic
    text does not explain of the score. The base model is a candidate, too: the adapter leads it by the mean
    of both, less a share of the base model's confidence, less a threshold that follows from
    `false_positive_rate` (equations 6 and 7). A handicap is taken from an adapter's score, not its residual.

    Args:
        temperature: of the softmax over scores, in standard deviations of generic text, above 0.
        top_k: at most this many adapters keep a weight, at least 1; None keeps all.
        false_positive_rate: of queries that no adapter fits, the share that may be sent to one, in (0, 1).

    Attributes:
        mean_, std_: (adapters, modules, 2) of the log response over the reference queries, NaN without a
            prototype.
        filter_: (adapters, modules, 2) weights in the score, 0 without a prototype.
        landmarks_: (landmarks,) numbers of the adapters that tell what all respond to alike.
        axes_: (landmarks, modules, 2, FACTORS) the principal directions among them, 0 without a prototype.
        loadings_: (adapters, modules, 2, FACTORS) how much of each is taken out of an adapter's responses.
        reference_: (reference queries, landmarks, modules, 2) float32 standardised log responses, 0 without a
            prototype.
        coefficients_: (reference queries, adapters) of the regression of the scores on generic text.
        residual_scale_: (adapters,) deviation of its leave-one-out residuals.
        handicap_: (adapters,) what each adapter's score loses.
        confidence_: (2,) mean and deviation of the base model's confidence over the reference queries.
        reference_leads_: (reference queries,) cross-validated lead of the best adapter, before the threshold.
        threshold_: what a lead has to exceed.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> generic = rng.uniform(0.1, 0.2, (40, 3, 5, 2))  # 40 prompts, 3 adapters, 5 modules
        >>> gate = PrototypeGate(false_positive_rate=0.1).fit(generic)
        >>> query = generic[:1].copy()
        >>> query[:, 1] *= 2  # the second adapter responds twice as strongly
        >>> gate.predict(query).tolist()
        [1]
    """

    def __init__(
        self,
        temperature: float = TEMPERATURE,
        top_k: int | None = TOP_K,
        false_positive_rate: float = FALSE_POSITIVE_RATE,
    ) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.false_positive_rate = false_positive_rate

    def fit(
        self,
        X: ArrayLike,
        y: Any = None,
        confidence: ArrayLike | None = None,
        handicap: ArrayLike | None = None,
    ) -> Self:
        """Learns the reference from responses to generic text.

        Args:
            X: (reference queries, adapters, modules, 2) responses, NaN where an adapter has no
                prototype; at least 4 reference queries.
            y: ignored.
            confidence: (reference queries,) of the base model: log-probability, in nats, of the likeliest
                next token; None leaves it out.
            handicap: (adapters,) what each adapter's score loses; None is nothing.

        Raises:
            ValueError: wrong shape, a parameter out of its range, or an adapter without any prototype.
        """
        X = _four_dimensional(X)
        if len(X) < 4:
            raise ValueError(f"expected at least 4 reference queries, got {len(X)}")
        if not X.shape[1]:
            raise ValueError("expected at least 1 adapter, got none")
        if not 0 < self.false_positive_rate < 1:
            raise ValueError(
                f"expected a false_positive_rate between 0 and 1, got {self.false_positive_rate}"
            )
        _check(X, absent := np.isnan(X[0]))
        if (empty := absent.all((1, 2))).any():
            raise ValueError(f"adapters {np.flatnonzero(empty).tolist()} have no prototype at any module")
        sure = np.zeros(len(X)) if confidence is None else _finite(confidence, len(X), "confidences")
        lost = np.zeros(X.shape[1]) if handicap is None else handicap
        self.handicap_ = _finite(lost, X.shape[1], "handicaps")
        logs = self._by_module(X)
        leads = np.empty(len(X))
        folds = min(FOLDS, len(X) // 2)
        for fold in range(folds):
            out = np.arange(len(X)) % folds == fold
            leads[out] = _lead(self._learn(logs, ~out, absent).judge(X[out]))
        self._learn(logs, np.full(len(X), True), absent)
        self.confidence_ = np.array([sure.mean(), max(sure.std(ddof=1), 1e-3)])
        self.reference_leads_ = leads - self._doubt(confidence, len(X))
        self.threshold_ = threshold(self.reference_leads_, generic_share(self.false_positive_rate))
        return self

    def _by_module(self, X: NDArray[Any]) -> Callable[[slice], Array]:
        """Gives the log responses at some modules, as `columns_of` does: here, all are in memory."""
        return columns_of(X).__getitem__

    def _landmarks(self, n_adapters: int) -> NDArray[np.int64]:
        """The adapters that tell what all respond to alike: here, all."""
        return np.arange(n_adapters)

    def _learn(
        self, logs: Callable[[slice], Array], some: NDArray[np.bool_], absent: NDArray[np.bool_]
    ) -> Self:
        """Learns all but the threshold; some modules at a time, as many adapters would fill the memory.

        Args:
            logs: gives (some modules, 2, reference queries, adapters), see `_by_module`.
            some: (reference queries,) those that it learns from.
            absent: (adapters, modules, 2) where there is no prototype.
        """
        self.n_adapters_, self.n_modules_ = absent.shape[:2]
        block = max(1, min(BLOCK, WIDE // self.n_adapters_))
        blocks = [slice(start, start + block) for start in range(0, self.n_modules_, block)]
        mean, std = np.empty((2, self.n_modules_, 2, self.n_adapters_))
        for part in blocks:
            z = logs(part)[:, :, some]  # (block, 2, queries, adapters)
            mean[part], std[part] = z.mean(2), z.std(2, ddof=1).clip(1e-3)
        self.mean_, self.std_ = (
            np.where(absent, np.nan, values.transpose(2, 0, 1)) for values in (mean, std)
        )
        self.filter_ = _matched(self.mean_, self.std_)
        who = self.landmarks_ = self._landmarks(self.n_adapters_)
        axes, loadings = (np.zeros((self.n_modules_, 2, n, FACTORS)) for n in (len(who), self.n_adapters_))
        self.axes_, self.loadings_ = axes.transpose(2, 0, 1, 3), loadings.transpose(2, 0, 1, 3)
        n_queries = int(some.sum())
        self.reference_ = np.empty((n_queries, len(who), self.n_modules_, 2), np.float32)
        scores = np.zeros((n_queries, self.n_adapters_))
        for part in blocks:
            z = logs(part)[:, :, some] - mean[part, :, None]
            z /= std[part, :, None]
            theirs = z if len(who) == self.n_adapters_ else z[..., who]
            self.reference_[:, :, part] = theirs.astype(np.float32).transpose(2, 3, 0, 1)
            common, shares, factors, noise = _common(z, theirs)
            axes[part, ..., : common.shape[3]], loadings[part, ..., : common.shape[3]] = common, shares
            self.filter_[:, part] /= noise
            z -= factors @ shares.swapaxes(2, 3)
            scores += np.einsum("mvqa,amv->qa", z, self.filter_[:, part])
        # Of an adapter that responds to all text alike, there is rounding alone.
        scale = np.maximum(scores.std(0, ddof=1), 1e-6 * self.filter_.sum((1, 2)))  # (adapters,)
        self.filter_ /= scale[:, None, None]
        points = self.reference_.reshape(n_queries, -1)
        kernel = (points @ points.T).astype(np.float64)
        ridge = max(RIDGE * np.trace(kernel) / n_queries, 1e-6)  # texts that are all alike have none
        inverse = np.linalg.inv(kernel + ridge * np.eye(n_queries))
        self.coefficients_ = inverse @ (scores / scale)
        # With H = K (K + a I)^-1, what is left of a text that was left out is (s - H s) / (1 - h); a cancels.
        left = self.coefficients_ / np.diag(inverse)[:, None]
        self.residual_scale_ = left.std(0, ddof=1).clip(1e-6)
        return self

    def _standard(self, X: NDArray[Any], who: Any = slice(None)) -> Array:
        """Standardised log responses of some adapters (equation 2), (queries, some, modules, 2)."""
        z = np.array(X[:, who], dtype=np.float64)
        np.log(z.clip(FLOOR, out=z), out=z)
        z -= self.mean_[who]
        z /= self.std_[who]
        return np.nan_to_num(z, copy=False)

    def _factors(self, columns: Array) -> Array:
        """The size of each factor in the landmarks' responses, (modules, 2, queries, FACTORS).

        Args:
            columns: (modules, 2, queries, landmarks) standardised.
        """
        return np.asarray(columns @ self.axes_.transpose(1, 2, 0, 3))

    def _residual(self, z: Array, scores: Array, best: NDArray[np.int64]) -> Array:
        """The part of the best scores that generic text does not explain (equation 5), (queries,).

        Args:
            z: (queries, landmarks, modules, 2) standardised.
            scores: (queries,) of the best adapters.
        """
        points = self.reference_.reshape(len(self.reference_), -1)  # (reference queries, all entries)
        alike = z.reshape(-1, points.shape[1]).astype(np.float32) @ points.T
        explained = (alike * self.coefficients_.T[best]).sum(1)
        return np.asarray((scores - explained) / self.residual_scale_[best])

    def judge(self, X: NDArray[Any]) -> Judged:
        """Both scores of responses that are known to be finite where there is a prototype.

        Args:
            X: (queries, adapters, modules, 2).
        """
        z = self._standard(X)
        specific = np.array(z.transpose(2, 3, 0, 1), order="C")  # (modules, 2, queries, adapters), a copy
        specific -= self._factors(specific) @ self.loadings_.transpose(1, 2, 3, 0)
        scores = np.einsum("mvqa,amv->qa", specific, self.filter_)
        rows = np.arange(len(X))
        best = (scores - self.handicap_).argmax(1)
        votes = self._votes(specific[:, :, rows, best].transpose(2, 0, 1), best)
        return Judged(scores - self.handicap_, self._residual(z, scores[rows, best], best), votes)

    def _votes(self, specific: Array, best: NDArray[np.int64]) -> Array:
        """The vote of each module for the best adapters, (queries, modules); NaN without a prototype.

        Args:
            specific: (queries, modules, 2) of these adapters, from equation 3.
        """
        there = ~np.isnan(self.mean_[best, :, 0])  # (queries, modules)
        votes = (specific * self.filter_[best]).sum(-1) * there.sum(1, keepdims=True)
        return np.where(there, votes, np.nan)

    def decision_function(self, X: ArrayLike) -> Array:
        """Calibrated scores, (queries, adapters), in standard deviations of generic text."""
        return self.judge(self._checked(X)).scores

    def _checked(self, X: ArrayLike) -> NDArray[Any]:
        """Responses that are known to be of this library."""
        check_is_fitted(self)
        X = _four_dimensional(X)
        if X.shape[1:] != self.mean_.shape:
            raise ValueError(
                f"expected responses of {self.n_adapters_} adapters at {self.n_modules_} modules, "
                f"got {X.shape[1]} and {X.shape[2]}"
            )
        _check(X, np.isnan(self.mean_))
        return X

    def _doubt(self, confidence: ArrayLike | None, n_queries: int) -> Array:
        """The base model's confidence as it counts against an adapter, (queries,)."""
        if confidence is None:
            return np.zeros(n_queries)
        usual, spread = self.confidence_
        return np.asarray(DOUBT * (_finite(confidence, n_queries, "confidences") - usual) / spread)

    def candidate_scores(self, judged: Judged, confidence: ArrayLike | None = None) -> Array:
        """Scores that compare, (queries, adapters + 1), the base model last (equation 6).

        The base model's is as far below the best adapter's as that one leads.

        Args:
            confidence: (queries,) of the base model, as in `fit`.
        """
        check_is_fitted(self)
        lead = _lead(judged) - self._doubt(confidence, len(judged.scores)) - self.threshold_
        return np.column_stack([judged.scores, judged.scores.max(1, initial=-np.inf) - lead])

    def thresholds(self) -> dict[str, float]:
        """For each of SHARES, and for `false_positive_rate`, its threshold less the one of this gate."""
        check_is_fitted(self)
        shares = sorted({*SHARES, self.false_positive_rate})
        at = {share: threshold(self.reference_leads_, generic_share(share)) for share in shares}
        return {f"{share:g}": value - self.threshold_ for share, value in at.items()}

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
            order = np.argsort(-weights[:, :-1], axis=1, kind="stable")  # of equal ones the first
            np.put_along_axis(weights, order[:, self.top_k :], 0.0, axis=1)
        return np.asarray(weights / weights.sum(1, keepdims=True))

    def predict_proba(self, X: ArrayLike, confidence: ArrayLike | None = None) -> Array:
        """Weights, (queries, adapters + 1); rows sum to 1, the last column is the base model."""
        return self.weights(self.candidate_scores(self.judge(self._checked(X)), confidence))

    def predict(self, X: ArrayLike, confidence: ArrayLike | None = None) -> NDArray[np.int64]:
        """The top candidate of each query; the number of adapters means the base model."""
        return np.asarray(self.predict_proba(X, confidence).argmax(1))


def generic_share(false_positive_rate: float) -> float:
    """The share of generic text that goes to an adapter where this share of queries does that none fits.

    Example:
        >>> round(generic_share(0.05), 3)
        0.15
    """
    odds = NEARER * false_positive_rate / (1 - false_positive_rate)
    return odds / (1 + odds)


def threshold(leads: Array, share: float) -> float:
    """The threshold that such a share of leads exceeds (equation 7).

    Up to a share of TAIL it is read off the leads. A rarer one is read off the exponential that has the mean
    excess of the highest: generalised Pareto with shape 0 (Pickands 1975).

    Args:
        leads: (n,) of generic text.
        share: in (0, 1).

    Example:
        >>> threshold(np.arange(101.0), 0.5)
        50.0
    """
    start = float(np.quantile(leads, 1 - max(TAIL, share)))
    if share >= TAIL or not (leads > start).any():
        return start
    excess = float((leads[leads > start] - start).mean())
    return start + excess * float(np.log(TAIL / share))


def _lead(judged: Judged) -> Array:
    """How far the best adapter leads, before doubt and threshold, (queries,)."""
    return np.asarray((1 - RESIDUAL) * judged.scores.max(1, initial=-np.inf) + RESIDUAL * judged.residual)


def _matched(means: Array, stds: Array) -> Array:
    """The matched filter in any unit, (adapters, modules, 2); 0 without a prototype (equation 4).

    A module with no response to generic text has no weight: what there is is rounding. Neither energy nor
    deviation counts as less than a tenth of the adapter's median.
    """
    energy = np.exp(2 * means)
    low = [np.nanmedian(values.reshape(len(values), -1), 1)[:, None, None] / 10 for values in (energy, stds)]
    weights = 1 / (np.maximum(energy, low[0]) * np.maximum(stds, low[1]))
    heard = means > np.log(10 * FLOOR)
    heard |= ~heard.any((1, 2), keepdims=True)  # an adapter that is silent everywhere
    return np.asarray(np.nan_to_num(weights * heard))


def _common(z: Array, theirs: Array) -> tuple[Array, Array, Array, Array]:
    """The factors to which adapters respond alike, by module and view (equation 3).

    Their correlations are taken as a few principal components and noise, which is the same for all
    (probabilistic PCA, Tipping and Bishop 1999), and moved towards independence by SHRINK. With n the noise
    after that, the inverse is `(I - U diag(1 - n / (0.7 L + 0.3)) U^T) / n`; nothing is inverted: the second
    term is taken out of the responses, and the filter is divided by n.

    Args:
        z: (modules, 2, queries, adapters) standardised, 0 without a prototype.
        theirs: the landmarks' among them, whose components these are.

    Returns:
        (modules, 2, landmarks, r) directions, (modules, 2, adapters, r) how much of each is taken out,
        (modules, 2, queries, r) how much of each the queries have, and the noise, (modules, 2); r is at most
        FACTORS.
    """
    freedom = z.shape[2] - 1
    turned = theirs.swapaxes(2, 3)
    wide = theirs.shape[3] > theirs.shape[2]
    square = (theirs @ turned if wide else turned @ theirs) / freedom
    values, vectors = (part.numpy()[..., -FACTORS:] for part in torch.linalg.eigh(torch.from_numpy(square)))
    values = values.clip(1e-12)[..., None, :]  # (modules, 2, 1, r)
    axes = turned @ vectors / np.sqrt(freedom * values) if wide else vectors
    rest = np.trace(square, axis1=2, axis2=3) - values.sum((2, 3))
    rest /= np.maximum(1, theirs.any(2).sum(2) - FACTORS)
    noise = (1 - SHRINK) * rest.clip(0) + SHRINK  # (modules, 2)
    taken = 1 - noise[..., None, None] / ((1 - SHRINK) * values + SHRINK)
    factors = theirs @ axes  # (modules, 2, queries, r)
    loadings = z.swapaxes(2, 3) @ factors * (taken.clip(0) / (freedom * values))
    return axes, loadings, factors, noise


def _check(X: NDArray[Any], absent: NDArray[np.bool_]) -> None:
    """Refuses values that are not finite where an adapter has a prototype, and finite ones elsewhere."""
    buffer = np.empty(absent.shape, bool)  # used again and again, since a large one takes time to get
    for row in X:
        if np.equal(np.isfinite(row, out=buffer), absent, out=buffer).any():
            raise ValueError(
                "expected finite responses, NaN at the same adapters and modules for all queries: "
                "those without a prototype"
            )


def _finite(values: ArrayLike, count: int, what: str) -> Array:
    array = np.array(values, dtype=np.float64)
    if array.shape != (count,) or not np.isfinite(array).all():
        raise ValueError(f"expected {count} finite {what}, got an array of shape {array.shape}")
    return array


def _four_dimensional(X: ArrayLike) -> NDArray[Any]:
    X = np.asarray(X)
    X = X if X.dtype.kind == "f" else X.astype(np.float64)
    if X.ndim != 4 or X.shape[3] != 2:
        raise ValueError(f"expected responses of shape (queries, adapters, modules, 2), got {X.shape}")
    return X


def columns_of(X: NDArray[Any]) -> Array:
    """Log responses, (modules, 2, queries, adapters): matrices side by side, 0 without a prototype."""
    columns = np.empty((*X.shape[2:], *X.shape[:2]))
    for m, part in enumerate(columns):  # module by module, since the array may be large
        part[:] = X[:, :, m].transpose(2, 0, 1)
        np.log(part.clip(FLOOR, out=part), out=part)
        np.nan_to_num(part, copy=False)
    return columns
