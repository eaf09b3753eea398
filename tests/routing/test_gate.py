import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

from router.routing.gate import PrototypeGate, Trials
from router.settings import Settings

RNG = np.random.default_rng(3)
GENERIC = RNG.lognormal(-2.0, 0.2, (200, 6, 10))  # (queries, adapters, modules)


def queries(adapter, rise=1.0, n=20, seed=4):
    """Responses like generic text, but for one adapter whose modules respond more strongly."""
    X = np.random.default_rng(seed).lognormal(-2.0, 0.2, (n, 6, 10))
    X[:, adapter] *= np.exp(rise)
    return X


def test_weights_sum_to_one_and_the_risen_adapter_wins():
    gate = PrototypeGate().fit(GENERIC)
    for adapter in range(6):
        weights = gate.predict_proba(queries(adapter))
        assert weights.shape == (20, 7)
        np.testing.assert_allclose(weights.sum(1), 1.0)
        assert (weights.argmax(1) == adapter).all()


def test_generic_text_passes_the_base_model_as_often_as_not():
    fresh = np.random.default_rng(9).lognormal(-2.0, 0.2, (300, 6, 10))
    predicted = PrototypeGate().fit(GENERIC).predict(fresh)
    assert 0.4 < (predicted == 6).mean() < 0.6  # the level that the best adapter reaches half the time


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.9])
def test_generic_text_passes_the_base_model_by_the_chance_that_was_asked_for(chance):
    fresh = np.random.default_rng(9).lognormal(-2.0, 0.2, (300, 6, 10))
    predicted = PrototypeGate(chance=chance).fit(GENERIC).predict(fresh)
    assert (predicted < 6).mean() == pytest.approx(chance, abs=0.1)


def test_an_adapters_size_does_not_matter():
    size = np.array([1.0, 50.0, 0.02, 1.0, 3.0, 1.0])[:, None]
    plain = PrototypeGate().fit(GENERIC).predict_proba(queries(2, 0.3))
    scaled = PrototypeGate().fit(GENERIC * size).predict_proba(queries(2, 0.3) * size)
    np.testing.assert_allclose(scaled, plain, atol=1e-9)


def test_a_query_is_judged_alone():
    gate, X = PrototypeGate().fit(GENERIC), queries(1, 0.3)
    np.testing.assert_allclose(gate.predict_proba(X)[:1], gate.predict_proba(X[:1]), atol=1e-12)


def test_adapters_with_few_modules_are_comparable():
    absent = GENERIC.copy()
    absent[:, 0, 2:] = np.nan
    X = queries(0)
    X[:, 0, 2:] = np.nan
    gate = PrototypeGate().fit(absent)
    assert (gate.predict(X) == 0).all()
    other = queries(3)
    other[:, 0, 2:] = np.nan
    assert (gate.predict(other) == 3).all()


def test_top_k_and_temperature():
    X = queries(1, 0.1)
    assert ((PrototypeGate(top_k=2).fit(GENERIC).predict_proba(X)[:, :-1] > 0).sum(1) <= 2).all()
    assert ((PrototypeGate(top_k=None).fit(GENERIC).predict_proba(X) > 0).all(1)).all()
    cold = PrototypeGate(temperature=0.1).fit(GENERIC).predict_proba(X).max(1)
    warm = PrototypeGate(temperature=10.0).fit(GENERIC).predict_proba(X).max(1)
    assert (cold > warm).all()


def test_it_is_a_scikit_learn_estimator():
    given = {"temperature": 2.0, "top_k": None, "reach": 1.0, "max_shortlist": 2, "chance": 0.1}
    gate = PrototypeGate(**given)
    assert clone(gate).get_params() == given
    assert gate.fit(GENERIC) is gate


class MatrixGate(PrototypeGate):
    """The same gate on the matrices of scikit-learn's checks: each column an adapter of one module."""

    def fit(self, X, y=None):
        return super().fit(cube(X), y)

    def decision_function(self, X):
        return super().decision_function(cube(X))


def cube(X):
    X = np.asarray(X)
    return X[..., None] if X.ndim == 2 else X


# What scikit-learn expects of every estimator and the gate does not do, even on matrices.
UNLIKE = {
    "check_n_features_in": "a query has adapters and modules, so it is n_adapters_ and n_modules_",
    "check_n_features_in_after_fitting": "a query has adapters and modules, and the refusal counts both",
    "check_complex_data": "refusing it is left to NumPy, which warns",
    "check_estimators_empty_data_messages": "the refusal speaks of adapters, not of features",
    "check_fit2d_1sample": "the refusal speaks of reference queries, not of samples",
    "check_fit2d_predict1d": "the refusal names the three dimensions instead of advising to reshape",
    "check_estimator_sparse_tag": "there is no sparse array of three dimensions to refuse by name",
    "check_estimator_sparse_array": "there is no sparse array of three dimensions to refuse by name",
    "check_estimator_sparse_matrix": "there is no sparse array of three dimensions to refuse by name",
}
# What it does on matrices, as MatrixGate shows, and cannot be seen to do where it is given two dimensions.
UNSEEN = dict.fromkeys(
    """
    check_fit_score_takes_y check_estimators_overwrite_params check_dont_overwrite_parameters
    check_estimators_fit_returns_self check_readonly_memmap_input check_positive_only_tag_during_fit
    check_estimators_dtypes check_dtype_object check_estimators_nan_inf
    check_pipeline_consistency check_estimators_pickle
    check_f_contiguous_array_estimator check_methods_sample_order_invariance
    check_methods_subset_invariance check_fit2d_1feature check_dict_unchanged check_fit_idempotent
    check_fit_check_is_fitted
    """.split(),
    "the check's X has two dimensions, the gate's three",
)


@pytest.mark.parametrize(
    ("gate", "expected"),
    [(MatrixGate(), UNLIKE), (PrototypeGate(), UNLIKE | UNSEEN)],
    ids=["matrix", "as_it_is"],
)
def test_it_passes_scikit_learns_checks_but_for_these(gate, expected):
    results = check_estimator(gate, expected_failed_checks=expected, on_skip=None)
    assert {result["check_name"] for result in results if result["status"] == "xfail"} == set(expected)
    assert sum(result["status"] == "passed" for result in results) >= 12


@pytest.mark.parametrize(
    ("X", "message"),
    [
        (GENERIC[0], "3|dimensions"),
        (GENERIC[:1], "at least 2"),
        (np.full((5, 2, 3), np.nan), "no prototype"),
    ],
)
def test_wrong_references_are_refused(X, message):
    with pytest.raises(ValueError, match=message):
        PrototypeGate().fit(X)


def test_a_refused_fit_leaves_the_gate_as_it_was():
    found, fresh = PrototypeGate().fit(GENERIC), PrototypeGate().fit(GENERIC)
    broken = GENERIC.copy()
    broken[3, 2, 1] = np.nan
    with pytest.raises(ValueError, match="expected finite responses"):
        found.fit(broken)
    np.testing.assert_array_equal(found.predict_proba(GENERIC), fresh.predict_proba(GENERIC))


def test_responses_of_another_library_are_refused():
    with pytest.raises(ValueError, match="6 adapters"):
        PrototypeGate().fit(GENERIC).predict(GENERIC[:, :5])


def test_a_library_of_no_adapters_is_refused():
    with pytest.raises(ValueError, match="adapter"):
        PrototypeGate().fit(GENERIC[:, :0])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_query_without_a_number_is_refused(value):
    with pytest.raises(ValueError, match=r"NaN|inf|finite"), np.errstate(invalid="ignore"):
        PrototypeGate().fit(GENERIC).predict_proba(np.full((1, 6, 10), value))


# Trials. In the reference, the logarithm of the effect, the confidence and the base model's confidence have
# mean -1, -2 and -3, and deviation 0.5, 1 and 2.
PAIR = np.array([-1.0, 1.0]) / np.sqrt(2)  # deviation 1
REFERENCE = Trials(
    np.exp(np.tile(-1 + 0.5 * PAIR[:, None], 6)), np.tile(-2 + PAIR[:, None], 6), -3 + 2 * PAIR
)


def trials(n=1, effect=0.0, confidence=0.0, base=0.0):
    """Trials of n queries from standardised numbers; (n, 6), or whatever is broadcast to it."""
    return Trials(
        np.exp(-1 + 0.5 * np.broadcast_to(effect, (n, 6))),
        -2.0 + np.broadcast_to(confidence, (n, 6)),
        -3 + 2.0 * np.broadcast_to(base, n),
    )


def adapter_only(adapter, value, other=0.0):
    return np.where(np.arange(6) == adapter, value, other)


@pytest.fixture()
def gate():
    return PrototypeGate().fit(GENERIC).fit_trials(REFERENCE)


@pytest.fixture()
def long_gate():
    """The same with as many adapters on the shortlist as a trial could put first."""
    return PrototypeGate(max_shortlist=6).fit(GENERIC).fit_trials(REFERENCE)


@pytest.fixture()
def close():
    """One query: adapter 1 is best, 2 close behind, 3 well above generic text but out of reach."""
    X = np.exp(np.log(GENERIC).mean(0, keepdims=True))
    X[:, 1:4] *= np.exp([0.25, 0.2, 0.12])[:, None]
    return X


def various(n=300):
    rng = np.random.default_rng(6)
    return rng.lognormal(-2.0, 0.2, (n, 6, 10)) * np.exp(rng.uniform(-0.4, 0.2, (n, 6, 1)))


def any_trials(n=300):
    effect, confidence = np.random.default_rng(7).normal(0, 2, (2, n, 6))
    return trials(n, effect, confidence, np.random.default_rng(8).normal(0, 2, n))


def only(tried, found):
    return Trials(
        np.where(tried, found.effect, np.nan), np.where(tried, found.confidence, np.nan),
        found.base_confidence,
    )  # fmt: skip


def test_the_shortlist_is_what_a_trial_could_put_first(long_gate):
    gate, X = long_gate, various()
    shortlist = gate.shortlist(gate.decision_function(X))
    assert {0, 1, 2} <= set(shortlist.sum(1))
    for adapter in range(6):  # as confident as can be, unlike all others and the base model
        first = gate.predict(X, trials(300, 0.0, adapter_only(adapter, 9.0, -9.0), -9.0)) == adapter
        np.testing.assert_array_equal(shortlist[:, adapter], first)
    plain = gate.predict(X)
    named = plain < 6
    assert named.any() and shortlist[named, plain[named]].all()


def test_no_more_than_three_are_on_the_shortlist(gate, long_gate):
    scores = gate.decision_function(various())
    few, every = gate.shortlist(scores), long_gate.shortlist(scores)
    assert every.sum(1).max() > 3 == few.sum(1).max()
    for row, own, kept in zip(scores, every, few, strict=True):
        assert sorted(row[kept]) == sorted(row[own])[-3:]


def test_what_is_not_on_the_shortlist_would_not_have_won_had_it_been_tried(long_gate):
    X, found = various(), any_trials()
    shortlist = long_gate.shortlist(long_gate.decision_function(X))
    predicted = long_gate.predict(X, found)
    assert set(predicted) == set(range(7)) and not shortlist.all()
    np.testing.assert_array_equal(long_gate.predict(X, only(shortlist, found)), predicted)


def test_a_sure_adapter_passes_a_close_rival_and_no_other(gate, close):
    shortlist = gate.shortlist(gate.decision_function(close))
    assert shortlist.tolist() == [[False, True, True, False, False, False]]
    assert gate.predict(close, trials()) == gate.predict(close) == 1
    assert gate.predict(close, trials(confidence=adapter_only(2, gate.reach))) == 2
    assert gate.predict(close, trials(confidence=adapter_only(3, 9.0))) == 1


@pytest.mark.parametrize(
    ("confidence", "rise"), [(-9, 0), (-1, 0), (0, 0), (0.5, 0.5), (1, 1), (1.5, 1.5), (9, 1.5)]
)
def test_a_trial_raises_a_score_by_its_confidence_up_to_reach(gate, close, confidence, rise):
    plain = gate.decision_function(close)
    found = gate.candidate_scores(
        gate.decision_function(close), trials(confidence=adapter_only(2, confidence))
    )
    np.testing.assert_allclose(found[:, :-1] - plain, adapter_only(2, rise)[None], atol=1e-9)


@pytest.mark.parametrize("reach", [0.25, 3.0])
def test_reach_limits_both_the_rise_and_the_shortlist(close, reach):
    gate = PrototypeGate(reach=reach, max_shortlist=6).fit(GENERIC).fit_trials(REFERENCE)
    (plain,) = gate.decision_function(close)
    (found,) = gate.candidate_scores(plain[None], trials(confidence=adapter_only(2, 9.0)))
    assert found[2] - plain[2] == pytest.approx(reach)
    behind = max(plain.max(), gate.base_score_) - plain
    assert gate.shortlist(plain[None])[0].tolist() == (behind < reach).tolist()


def test_what_was_not_tried_has_no_weight(close):
    gate = PrototypeGate(top_k=None).fit(GENERIC).fit_trials(REFERENCE)
    for tried in ([1, 2], [2], []):
        found = only(np.isin(np.arange(6), tried)[None], trials())
        (weights,) = gate.predict_proba(close, found)
        assert np.flatnonzero(weights).tolist() == [*tried, 6]
        assert weights.sum() == pytest.approx(1)


def test_an_adapter_without_reference_trials_has_no_weight(close):
    gate = PrototypeGate(top_k=None).fit(GENERIC)
    gate.fit_trials(only(np.arange(6) != 1, REFERENCE))
    assert np.flatnonzero(gate.predict_proba(close, trials())[0] == 0).tolist() == [1]


def test_rows_sum_to_one_also_where_the_shortlist_is_empty(gate):
    X, found = various(), any_trials()
    shortlist = gate.shortlist(gate.decision_function(X))
    weights = gate.predict_proba(X, only(shortlist, found))
    np.testing.assert_allclose(weights.sum(1), 1.0)
    nobody = ~shortlist.any(1)
    assert nobody.any() and (weights[nobody, :-1] == 0).all() and (weights[nobody, -1] == 1).all()


def test_the_base_model_wins_where_it_is_unusually_sure_and_the_best_adapter_does_nothing_unusual(
    gate, close
):
    assert gate.predict(close, trials(base=1.0)) == 6
    assert gate.predict(close, trials(base=-1.0)) == 1
    assert gate.predict(close, trials(effect=3.0, base=1.0)) == 1
    assert gate.predict(close, trials(effect=adapter_only(1, 3.0), base=1.0)) == 1
    assert gate.predict(close, trials(effect=adapter_only(1, 0.0, 3.0), base=1.0)) == 6  # others' count not
    raised = trials(effect=adapter_only(2, 3.0), confidence=adapter_only(2, 9.0), base=1.0)
    assert gate.predict(close, raised) == 2  # the best is whoever is after trials


def test_the_base_model_is_level_where_both_are_as_unusual_and_never_below_its_own_score(gate, close):
    level = gate.candidate_scores(gate.decision_function(close), trials(effect=1.3, base=1.3))
    assert level[0, 6] == pytest.approx(level[0, 1])
    plain = gate.candidate_scores(gate.decision_function(close))[0, 6]
    assert gate.candidate_scores(gate.decision_function(close), trials(effect=9.0, base=-9.0))[0, 6] == plain


def test_an_adapters_size_of_effect_does_not_matter(close):
    size, X, found = np.array([1.0, 50.0, 0.02, 1.0, 3.0, 1.0]), various(), any_trials()
    gate = PrototypeGate().fit(GENERIC)
    plain = gate.fit_trials(REFERENCE).predict_proba(X, found)
    gate.fit_trials(REFERENCE._replace(effect=REFERENCE.effect * size))
    scaled = gate.predict_proba(X, found._replace(effect=found.effect * size))
    np.testing.assert_allclose(scaled, plain, atol=1e-9)


def test_a_query_with_trials_is_judged_alone(gate):
    X, found = various(), any_trials()
    one = Trials(*(part[7:8] for part in found))
    np.testing.assert_allclose(gate.predict_proba(X, found)[7:8], gate.predict_proba(X[7:8], one), atol=1e-12)


def test_trials_need_a_reference_of_at_least_two(close):
    gate = PrototypeGate().fit(GENERIC)
    with pytest.raises(ValueError, match="at least 2 reference trials, got 1"):
        gate.fit_trials(trials())
    with pytest.raises(NotFittedError):
        gate.predict(close, trials())


def test_fitting_again_forgets_the_trials(gate, close):
    with pytest.raises(NotFittedError):
        gate.fit(GENERIC).predict(close, trials())


def test_its_defaults_are_those_of_a_run():
    given = PrototypeGate().get_params()
    assert (given["temperature"], given["top_k"]) == (Settings().temperature, Settings().top_k)
