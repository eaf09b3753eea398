import numpy as np
import pytest
from sklearn.base import clone

from router.gate import PrototypeGate

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
    assert (gate.predict(queries(3)) == 3).all()


def test_top_k_and_temperature():
    X = queries(1, 0.1)
    assert ((PrototypeGate(top_k=2).fit(GENERIC).predict_proba(X)[:, :-1] > 0).sum(1) <= 2).all()
    assert ((PrototypeGate(top_k=None).fit(GENERIC).predict_proba(X) > 0).all(1)).all()
    cold = PrototypeGate(temperature=0.1).fit(GENERIC).predict_proba(X).max(1)
    warm = PrototypeGate(temperature=10.0).fit(GENERIC).predict_proba(X).max(1)
    assert (cold > warm).all()


def test_it_is_a_scikit_learn_estimator():
    gate = PrototypeGate(temperature=2.0, top_k=None)
    assert clone(gate).get_params() == {"temperature": 2.0, "top_k": None}
    assert gate.fit(GENERIC) is gate


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


def test_responses_of_another_library_are_refused():
    with pytest.raises(ValueError, match="6 adapters"):
        PrototypeGate().fit(GENERIC).predict(GENERIC[:, :5])
