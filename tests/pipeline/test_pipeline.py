"""The routed pipeline: what was decided is in the result and nowhere else."""

import numpy as np
import pytest

from helpers import PROMPTS, method_of
from router.queries.submission import Query

TEXTS = [*PROMPTS[:3], "word " * 60]
QUERIES = [Query(str(n), text, "generation") for n, text in enumerate(TEXTS)]
QUERIES += [Query("m", "Stone or pear? ", "multiple_choice", ("stone", "pear"))]


@pytest.fixture()
def method(base, tiny_library, tmp_path):
    """Makes a method with its base model and library attached."""

    def make(name, **settings):
        return method_of(name, base, tiny_library, output_folder=tmp_path / "out", max_gen_len=4, **settings)

    return make


@pytest.mark.parametrize("name", ["proto_route", "base", "average", "ties", "arrow", "logo", "mass"])
def test_a_method_keeps_nothing_of_what_it_answered(method, name, tmp_path):
    found = method(name)
    first = found.answer(QUERIES, tmp_path)
    found.answer(QUERIES[:1], tmp_path)
    again = found.answer(QUERIES, tmp_path)
    assert again.answers == first.answers
    np.testing.assert_array_equal(again.decision.routing.weights, first.decision.routing.weights)


def test_what_is_cut_of_long_prompts_is_told(method, caplog, monkeypatch, tmp_path):
    found = method("average")
    whole = found.encoded(QUERIES)
    assert method("average", max_seq_len=7).encoded(QUERIES) == [row[:7] for row in whole]
    lengths = sorted(map(len, whole))
    caplog.clear()
    found.answer(QUERIES, tmp_path)
    assert caplog.messages == []
    method("average", max_seq_len=lengths[-2]).answer(QUERIES, tmp_path)
    monkeypatch.setattr(found.base.model.config, "max_position_embeddings", lengths[-1] - 1)
    found.answer(QUERIES, tmp_path)
    for told, count in zip(caplog.messages, (2, 1), strict=True):
        assert f"{count} of {len(QUERIES)} prompts" in told and "--max_seq_len" in told


def test_few_prompts_at_a_time_are_routed_as_all_at_once(method, monkeypatch):
    found = method("proto_route")
    expected = found.route(QUERIES, found.encoded(QUERIES))
    monkeypatch.setattr("router.pipeline.fitted.RESPONSES", 1)
    assert found.fitted().at_once == 1
    one_by_one = found.route(QUERIES, found.encoded(QUERIES))
    np.testing.assert_allclose(one_by_one.weights, expected.weights, atol=1e-5)
    np.testing.assert_allclose(one_by_one.evidence.scores, expected.evidence.scores, atol=1e-3)


def test_a_prompt_without_finite_activations_goes_to_the_base_model_alone(method):
    made = method("proto_route", false_positive_rate=0.9)
    fitted, rows = made.fitted(), made.encoded(QUERIES)
    probed = fitted.probe(made.base.model, rows, made.tokenizer.pad_token_id, None)
    weights, evidence = fitted.decide(probed)
    np.testing.assert_allclose(evidence.responses, np.nanmean(probed.responses[..., 0], 2), rtol=1e-5)
    responses, confidence = probed.responses.copy(), probed.confidence.copy()
    responses[1, 1, 0], confidence[3] = np.inf, np.nan
    found, told = fitted.decide(probed._replace(responses=responses, confidence=confidence))
    assert found[[1, 3]].tolist() == [[0, 0, 0, 1]] * 2
    assert np.isinf(responses[1, 1, 0]).all()  # not changed
    np.testing.assert_allclose(found[[0, 2, 4]], weights[[0, 2, 4]])
    np.testing.assert_allclose(told.candidates[[0, 2, 4]], evidence.candidates[[0, 2, 4]])
    assert np.isfinite(told.candidates).all() and (evidence.candidates[:, -1] == evidence.base_score).all()
