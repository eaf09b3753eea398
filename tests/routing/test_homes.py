"""In which form adapters were trained, against all ways to part a library in two; what a handicap does."""

import numpy as np
import pytest

from router.api import Router
from router.model.frames import ALPACA, BARE, Frame
from router.routing.gate import PrototypeGate
from router.routing.homes import AWAY, CLEAR, GAP, trained_in
from router.routing.large import LargeGate


def responses(gains, noise=0.02, modules=40, seed=0):
    """Responses of adapters to some text without a form, and in one that raises them so much."""
    rng = np.random.default_rng(seed)
    bare = rng.lognormal(-2, 0.3, (20, len(gains), modules))
    rise = np.array(gains)[:, None] + rng.normal(0, noise, (len(gains), modules)) * modules**0.5
    return bare * np.exp(rise + rng.normal(0.3, 0.1, (20, 1, modules))), bare


def by_all_cuts(gain):
    """The best of all cuts into a lower and an upper group, if it is a clear one."""
    order, found = np.argsort(gain), []
    for cut in range(2, len(gain) - 1):
        low, high = gain[order[:cut]], gain[order[cut:]]
        spread = np.sqrt((low.var() * len(low) + high.var() * len(high)) / len(gain))
        found.append((spread, high.mean() - low.mean(), set(order[cut:].tolist())))
    if not found:
        return set()
    spread, gap, upper = min(found, key=lambda one: one[0])
    return upper if gap >= GAP and gap >= CLEAR * spread else set()


@pytest.mark.parametrize("seed", range(40))
def test_two_groups_are_found_as_by_trying_all_cuts(seed):
    rng = np.random.default_rng(seed)
    gains = rng.choice([0, 0.15, 0.3], rng.integers(2, 15), p=[0.6, 0.2, 0.2])
    framed, bare = responses(gains, noise=0.03, seed=seed)
    framed[:, 1, 9:] = bare[:, 0, :9] = np.nan  # without a prototype there
    gains = np.log(framed / bare).mean(0)
    gain = np.nanmean(gains - np.nanmean(gains, 0), 1)
    assert set(np.flatnonzero(trained_in(framed, bare)).tolist()) == by_all_cuts(gain)
    for alike in ([0.2] * 12, [0.3, *[0.0] * 11], [0.3, 0.3, 0.0]):
        assert not trained_in(*responses(alike, seed=seed)).any()  # of one form, or a single one


@pytest.mark.parametrize("kind", [PrototypeGate, LargeGate])
def test_a_score_loses_its_handicap_and_the_residual_does_not(kind):
    rng = np.random.default_rng(5)
    generic, X = (rng.lognormal(-2, 0.2, (n, 80, 4, 2)) for n in (60, 12))
    X[:, 5] *= 2.5
    X[:, 7] *= 1.8
    gate, handicap = kind().fit(generic), np.zeros(80)
    plain = gate.judge(X)
    assert (plain.scores.argmax(1) == 5).all()
    handicap[[5, 9]] = 0.5, 3.0
    other = kind().fit(generic, handicap=handicap).judge(X)
    listed = np.isfinite(plain.scores) & np.isfinite(other.scores)
    lost = np.where(listed, plain.scores, 0) - np.where(listed, other.scores, 0)
    np.testing.assert_allclose(lost, np.where(listed, handicap, 0), atol=1e-9)
    np.testing.assert_allclose(plain.residual, other.residual)
    handicap[5] = 1e3
    assert (kind().fit(generic, handicap=handicap).judge(X).scores.argmax(1) == 7).all()
    for wrong in (np.zeros(3), np.full(80, np.nan)):
        with pytest.raises(ValueError, match="80 finite handicaps"):
            kind().fit(generic, handicap=wrong)


@pytest.mark.slow
def test_a_saved_router_knows_homes_in_frames_that_come_later(chat_router, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "router.pipeline.fitted.trained_in", lambda framed, bare: np.array([True, False, False])
    )
    monkeypatch.setattr("router.methods.proto_route.LEAST", 1)  # the library has three
    made = chat_router().fit(["a", "b"])
    template = made._method.template.frame
    assert made._method.forms == [ALPACA, template]
    fitted = made._method.fitted
    assert fitted(BARE).gate.handicap_.tolist() == [AWAY, 0, 0]
    assert fitted(template).gate.handicap_.tolist() == [0, AWAY, AWAY]
    late = Frame(f"be kind{template.before}", template.after)
    loaded = Router.load(made.save(tmp_path / "saved"), device="cpu")
    loaded.calibrate(late)
    for frame, lost in ((BARE, [AWAY, 0, 0]), (late, [0, AWAY, AWAY]), (Frame("Q: ", "\nA:"), [AWAY, 0, 0])):
        assert loaded._method.fitted(frame).gate.handicap_.tolist() == lost
    found = made.route(["a", [{"role": "user", "content": "a"}]])
    assert (loaded.route(["a", [{"role": "user", "content": "a"}]]) == found).all().all()
