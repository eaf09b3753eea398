"""The gate against a reading of its docstring by plain loops, and what it promises on text of known law."""

import math

import numpy as np
import pytest
from sklearn.utils.estimator_checks import check_estimator

from router.routing.gate import DOUBT, FACTORS, RIDGE, SHRINK, TAIL, PrototypeGate, threshold
from router.routing.large import LargeGate, gate_for

RNG = np.random.default_rng(3)
GENERIC = RNG.lognormal(-2.0, 0.2, (200, 6, 10, 2))  # (queries, adapters, modules, views)


def queries(adapter, rise=1.0, n=20, seed=4):
    """Responses like generic text, but for one adapter whose modules respond more strongly."""
    X = np.random.default_rng(seed).lognormal(-2.0, 0.2, (n, 6, 10, 2))
    X[:, adapter] *= np.exp(rise)
    return X


def library(n, seed=0, modules=6, common=(0, 0.6)):
    """A law of responses to generic text, and its own way to draw from it: (queries, n, modules, 2).

    Every adapter and module has a size and a spread of its own. They correlate by a factor of all adapters,
    with loadings in the range `common`, one of each adapter, and one of each module that both views share.
    """
    rng = np.random.default_rng(seed)
    mean, spread = rng.normal(-2, 0.5, (n, modules, 1)), rng.uniform(0.05, 0.3, (n, modules, 1))
    part = rng.uniform(*common, (n, modules, 1))

    def draw(count, seed):
        rng = np.random.default_rng([n, seed])
        of_all = rng.normal(size=(count, 1, modules, 1))
        of_adapter = rng.normal(size=(count, n, 1, 1))
        of_module = rng.normal(size=(count, n, modules, 1))
        own = rng.normal(size=(count, n, modules, 2))
        z = part * of_all + np.sqrt(1 - part**2) * (0.5 * of_adapter + 0.6 * of_module + 0.62 * own)
        return np.exp(mean + spread * z)

    return draw


# The docstring once more, column by column, with dense covariances and a linear solver.


def covariance_of(z):
    """What the adapters' responses to generic text have in common: a few components, noise, independence."""
    values, vectors = np.linalg.eigh(z.T @ z / (len(z) - 1))
    few = min(FACTORS, len(values))
    noise = values[:-few].mean() if few < len(values) else 0.0
    values = np.where(np.arange(len(values)) < len(values) - few, noise, values)
    return (1 - SHRINK) * (vectors * values) @ vectors.T + SHRINK * np.eye(len(values))


def votes_by_loops(reference, X):
    """Responses less what is common, filtered, of the reference and of X, (queries, adapters, modules).

    Also all that is standardised of each, (queries, adapters, modules, 2).
    """
    votes = [np.full(part.shape[:3], np.nan) for part in (reference, X)]
    points = [np.zeros(part.shape) for part in (reference, X)]
    for m in range(reference.shape[2]):
        there = [i for i in range(reference.shape[1]) if not math.isnan(reference[0, i, m, 0])]
        for part in votes:
            part[:, there, m] = 0
        for v in range(2) if there else ():
            logs = [np.log(part[:, there, m, v]) for part in (reference, X)]
            mean, std = logs[0].mean(0), logs[0].std(0, ddof=1)
            zs = [(part - mean) / std for part in logs]
            covariance = covariance_of(zs[0])
            # A rise d of R^2 raises log R by d / (2 R^2), and z by d / (2 R^2 std).
            rises = 1 / (2 * np.exp(mean) ** 2 * std)
            for k, z in enumerate(zs):
                points[k][:, there, m, v] = z
                votes[k][:, there, m] += rises * np.linalg.solve(covariance, z.T).T
    return votes, points


def judged_by_loops(reference, X):
    """Scores (queries, adapters), and residuals of all of them."""
    (known, found), (Z, z) = votes_by_loops(reference, X)
    known, found = np.nansum(known, 2), np.nansum(found, 2)
    scale = known.std(0, ddof=1)
    known, found = known / scale, found / scale
    Z, z = Z.reshape(len(Z), -1), z.reshape(len(z), -1)

    def slopes(keep):  # ridge regression of the scores on all that is standardised
        ridge = RIDGE * (Z**2).sum() / len(Z)
        return np.linalg.solve(Z[keep].T @ Z[keep] + ridge * np.eye(Z.shape[1]), Z[keep].T @ known[keep])

    left = [known[g] - Z[g] @ slopes(np.arange(len(Z)) != g) for g in range(len(Z))]
    return found, (found - z @ slopes(np.arange(len(Z)) >= 0)) / np.std(left, 0, ddof=1)


def of_best(scores, values):
    return values[np.arange(len(scores)), scores.argmax(1)]


def with_gaps(X):
    """The first adapter only at two modules, the second not at the first, and nobody else at the last."""
    X = X.copy()
    X[:, 0, 2:] = np.nan
    X[:, 1, 0] = np.nan
    X[:, 2:, 3] = np.nan  # leaves the second alone
    return X


@pytest.mark.parametrize("gaps", [False, True])
def test_both_scores_are_those_of_the_dense_formula(gaps):
    draw = library(8, modules=4, common=(0.5, 0.9))
    reference, X = draw(60, 0), draw(20, 1)
    if gaps:
        reference, X = with_gaps(reference), with_gaps(X)
    gate = PrototypeGate().fit(reference)
    scores, residuals = judged_by_loops(reference, X)
    found = gate.judge(X)
    np.testing.assert_allclose(found.scores, scores, atol=1e-9)
    np.testing.assert_allclose(gate.decision_function(X), scores, atol=1e-9)
    np.testing.assert_allclose(found.residual, of_best(scores, residuals), atol=1e-4)  # float32
    np.testing.assert_allclose(np.nanmean(found.votes, 1), scores.max(1), atol=1e-9)
    known, votes = (part.transpose(0, 2, 1) for part in votes_by_loops(reference, X)[0])
    parts = votes / np.nansum(known, 1).std(0, ddof=1)
    there = (~np.isnan(parts)).sum(1, keepdims=True)
    expected = np.stack([(parts * there)[q, :, scores[q].argmax()] for q in range(20)])
    np.testing.assert_allclose(found.votes, expected, atol=1e-9)


def test_the_threshold_is_of_leads_on_text_that_was_not_seen():
    reference = library(5, modules=3, common=(0.5, 0.9))(50, 0)
    expected = np.empty(50)
    for fold in range(5):
        out = np.arange(50) % 5 == fold
        scores, residuals = judged_by_loops(reference[~out], reference[out])
        expected[out] = (scores.max(1) + of_best(scores, residuals)) / 2
    for false_positive_rate, generic in ((0.05, 0.1499), (0.1, 0.2713), (0.4, 0.6907)):  # odds 3.35 times
        gate = PrototypeGate(false_positive_rate=false_positive_rate).fit(reference)
        np.testing.assert_allclose(gate.reference_leads_, expected, atol=1e-4)
        assert gate.threshold_ == pytest.approx(threshold(expected, generic), abs=1e-3)


def test_the_base_model_is_as_far_below_as_the_best_one_leads():
    gate = PrototypeGate().fit(GENERIC, confidence=RNG.normal(size=200))
    judged, sure = gate.judge(queries(2, 0.1, n=200)), RNG.normal(size=200)
    found = gate.candidate_scores(judged, sure)
    assert found.shape == (200, 7)
    np.testing.assert_array_equal(found[:, :-1], judged.scores)
    doubt = DOUBT * (sure - gate.confidence_[0]) / gate.confidence_[1]
    lead = (judged.scores.max(1) + judged.residual) / 2 - doubt - gate.threshold_
    np.testing.assert_allclose(found[:, :-1].max(1) - found[:, -1], lead)
    sent = gate.predict(queries(2, 0.1, n=200), sure) < 6
    np.testing.assert_array_equal(sent, lead > 0)
    assert 0 < sent.mean() < 1


def large(monkeypatch, **sizes):
    for name, value in sizes.items():
        monkeypatch.setattr(f"router.routing.large.{name}", value)


@pytest.mark.parametrize("gaps", [False, True])
def test_scores_on_a_shortlist_are_those_of_any_library(gaps, monkeypatch):
    assert type(gate_for(256)) is PrototypeGate and type(gate_for(257)) is LargeGate
    draw = library(20, modules=4, common=(0.3, 0.9))
    reference, X = draw(60, 0), draw(30, 1)
    if gaps:
        reference, X = with_gaps(reference), with_gaps(X)
    handicap = np.linspace(0, 2, 20)
    plain = PrototypeGate().fit(reference, handicap=handicap)
    expected = plain.judge(X)
    large(monkeypatch, LANDMARKS=20, SHORT=20)
    gate = LargeGate().fit(reference, handicap=handicap)
    for one, other in zip(gate.judge(X), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    assert gate.threshold_ == pytest.approx(plain.threshold_, abs=1e-6)
    large(monkeypatch, SHORT=4)
    found = LargeGate().fit(reference, handicap=handicap).judge(X).scores
    listed = np.isfinite(found)
    assert (listed.sum(1) == 4).all() and (found[~listed] == -np.inf).all()
    best = np.argsort(-expected.scores, 1)[:, :4]  # all columns fit into the guess, which is exact then
    assert np.take_along_axis(listed, best, 1).all()
    np.testing.assert_allclose(found[listed], expected.scores[listed], atol=1e-6)


def test_the_shortlist_has_the_best_adapter(monkeypatch):
    draw = library(60, modules=20)
    reference, X = draw(100, 0), draw(120, 1)
    X[np.arange(120), np.arange(120) % 60] *= 1.5
    some = np.random.default_rng(0).random((60, 20)) < 0.6  # every adapter lacks most modules
    some[:, 0] = False
    for part in (reference, X):
        part[:, some] = np.nan
    full = PrototypeGate().fit(reference).judge(X)
    best = full.scores.argmax(1)
    assert (best == np.arange(120) % 60).mean() > 0.9
    large(monkeypatch, LANDMARKS=60, SHORT=10)
    gate = LargeGate().fit(reference)
    found, weights = gate.decision_function(X), gate.predict_proba(X)
    assert (found.argmax(1) == best).mean() > 0.98
    np.testing.assert_allclose(weights.sum(1), 1)
    assert ((weights[:, :-1] > 0) <= np.isfinite(found)).all()
    large(monkeypatch, LANDMARKS=20, SHORT=60)  # a few tell what all respond to alike
    few = LargeGate().fit(reference).judge(X)
    assert np.corrcoef(few.scores.ravel(), full.scores.ravel())[0, 1] > 0.95
    assert (few.scores.argmax(1) == best).mean() > 0.8


def test_the_threshold_never_rises_with_the_share():
    scores = np.random.default_rng(1).normal(size=160)
    found = [threshold(scores, share) for share in np.linspace(0.001, 0.999, 999)]
    assert (np.diff(found) <= 0).all() and found[0] > scores.max() > found[-1] > scores.min() - 1e-9
    assert threshold(scores, TAIL - 1e-9) == pytest.approx(threshold(scores, TAIL))
    assert threshold(np.full(40, 1.5), 0.01) == 1.5


@pytest.mark.parametrize("share", [0.002, 0.01, 0.05, 0.1, 0.3])
def test_the_threshold_is_that_of_an_exponential_tail(share):
    rng = np.random.default_rng(2)
    fresh = 3 + 2 * rng.exponential(size=200_000)
    found = [(fresh > threshold(3 + 2 * rng.exponential(size=160), share)).mean() for _ in range(100)]
    assert np.median(found) == pytest.approx(share, rel=0.25)
    many = (fresh > threshold(3 + 2 * rng.exponential(size=50_000), share)).mean()
    assert many == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("n", [3, 20, 200])
def test_generic_text_passes_the_gate_as_often_as_its_share_says(n):
    """Also with more adapters than generic prompts, where scores of text that was fitted to are too low."""
    promised = (0.05, 0.1, 0.2, 0.5)
    held, seen = [], []
    for seed in range(4):
        draw = library(n, seed)
        reference, fresh = draw(160, 0), draw(400, 1)
        gate = PrototypeGate().fit(reference)
        leads, own = (of.scores.max(1) + of.residual for of in (gate.judge(fresh), gate.judge(reference)))
        held.append([(leads / 2 > threshold(gate.reference_leads_, share)).mean() for share in promised])
        seen.append([(leads > threshold(own, share)).mean() for share in promised])
    found = np.mean(held, 0) / promised
    assert (found > 0.5).all() and (found < 2).all(), found
    if n == 200:
        assert np.mean(seen, 0)[0] > 1.5 * np.mean(held, 0)[0]


@pytest.mark.parametrize(("top_k", "kept"), [(2, ([1, 2, 4], [1, 2, 4])), (3, ([0, 1, 2, 4], [1, 2, 3, 4]))])
def test_weights_are_the_softmax_of_the_kept_candidates(top_k, kept):
    candidates = np.array([[1.0, 3.0, 2.0, 0.5, 1.5], [-np.inf, 0.0, -1.0, -3.0, 9.0]])
    found = PrototypeGate(temperature=0.7, top_k=top_k).weights(candidates)
    for row, own, weights in zip(candidates, kept, found, strict=True):
        top = {k: math.exp(row[k] / 0.7) for k in own}
        expected = [top.get(k, 0.0) / sum(top.values()) for k in range(5)]
        np.testing.assert_allclose(weights, expected, rtol=1e-9)
    equal = PrototypeGate(top_k=5).weights(-(np.arange(301) % 2.0)[None])[0]
    assert np.flatnonzero(equal).tolist() == [0, 2, 4, 6, 8, 300]  # the first keep their weights


@pytest.mark.parametrize("noise", [0.0, 2e-6])
def test_a_module_that_is_silent_on_generic_text_says_nothing(noise):
    generic, X = GENERIC.copy(), queries(2, 0.5)
    generic[:, 2, 0], X[:, 2, 0] = 0.0, noise
    generic[:, 3, 0], X[:, 3, 0] = 0.0, noise
    gate = PrototypeGate().fit(generic)
    assert (gate.predict(X) == 2).all() and not gate.filter_[2:4, 0].any()
    assert np.abs(gate.decision_function(X)).max() < 100  # nor to the others


class MatrixGate(PrototypeGate):
    """The same gate on the matrices of scikit-learn's checks: each column an adapter of one module."""

    def fit(self, X, y=None):
        return super().fit(cube(X), y)

    def _checked(self, X):
        return super()._checked(cube(X))


def cube(X):
    X = np.asarray(X)
    return np.stack([X, X], -1)[:, :, None] if X.ndim == 2 else X


# What scikit-learn expects of every estimator and the gate does not do, even on matrices: it speaks of
# queries, adapters and modules, has four dimensions, and leaves the refusal of complex numbers to NumPy.
UNLIKE = (
    "n_features_in n_features_in_after_fitting complex_data estimators_empty_data_messages fit2d_1sample "
    "fit2d_predict1d estimator_sparse_tag estimator_sparse_array estimator_sparse_matrix"
)


def test_it_passes_scikit_learns_checks_but_for_these():
    unlike = {f"check_{name}": "unlike" for name in UNLIKE.split()}
    results = check_estimator(MatrixGate(), expected_failed_checks=unlike, on_skip=None)
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == set(unlike)
    assert sum(result["status"] == "passed" for result in results) >= 12


def test_what_fits_no_gate_is_refused():
    for X in (
        GENERIC[..., 0], GENERIC[..., :1], GENERIC[0], GENERIC[:3], GENERIC[:, :0],
        np.full((5, 2, 3, 2), np.nan),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            PrototypeGate().fit(X)
    gate = PrototypeGate().fit(GENERIC[:4])  # the fewest
    assert np.isfinite(gate.predict_proba(queries(1))).all()
    assert gate.predict_proba(GENERIC[:0]).shape == (0, 7) and gate.judge(GENERIC[:0]).votes.shape == (0, 10)
    for confidence in ([0.0] * 3, [np.nan] * 40, [[0.0]] * 40):
        with pytest.raises(ValueError, match="confidence"):
            PrototypeGate().fit(GENERIC[:40], confidence=confidence)
    full, gaps = PrototypeGate().fit(GENERIC), PrototypeGate().fit(with_gaps(GENERIC))
    for gate, X in (
        (full, GENERIC[:, :5]), (full, GENERIC[:, :, :9]), (full, GENERIC[..., 0]),  # of another library
        (full, np.full((1, 6, 10, 2), np.nan)), (full, np.full((1, 6, 10, 2), np.inf)),
        (gaps, queries(1)),  # a response where an adapter has no prototype
    ):  # fmt: skip
        with pytest.raises(ValueError), np.errstate(invalid="ignore"):
            gate.predict(X)
    for name, values in {
        "false_positive_rate": (0, 1, -0.1, 1.5, np.nan), "temperature": (0, -1.0, np.nan), "top_k": (0,),
    }.items():  # fmt: skip
        for value in values:
            with pytest.raises(ValueError, match=name):
                PrototypeGate(**{name: value}).fit(GENERIC).predict(GENERIC)


@pytest.mark.parametrize("place", [(3, 2, 1), (0, 2, 1), (3, 2, 1, 0), (0, 2, 1, 1)])
def test_a_refused_fit_leaves_the_gate_as_it_was(place):
    found, fresh, broken = PrototypeGate().fit(GENERIC), PrototypeGate().fit(GENERIC), GENERIC.copy()
    for broken[place] in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="finite"):
            found.fit(broken)
    np.testing.assert_array_equal(found.predict_proba(GENERIC), fresh.predict_proba(GENERIC))


def test_confidence_raises_the_base_model_within_the_promise():
    rng = np.random.default_rng(5)

    def generic(count):
        return np.exp(rng.normal(-2, 0.2, (count, 8, 6, 2))), rng.normal(-1.5, 0.6, count)

    X, sure = generic(400)
    gate = PrototypeGate(false_positive_rate=0.07).fit(X, confidence=sure)  # 0.2 of generic text
    same = PrototypeGate(false_positive_rate=0.07).fit(X, confidence=3 * sure - 7)
    assert gate.threshold_ == pytest.approx(same.threshold_)  # only how unusual a confidence is counts
    fresh, confidence = generic(2000)
    alarms = (gate.predict(fresh, confidence) < 8).mean()
    assert 0.1 < alarms < 0.4
