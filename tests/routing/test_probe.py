"""Both responses of a prompt against dense cosines in float64, token by token, from the files alone."""

import numpy as np
import pytest
import torch

from helpers import NAMES, dense_updates, inputs_of, plain_model
from router.model.answer import encode
from router.routing.probe import input_means, probe
from router.routing.prototypes import prototypes

# Of one, two and three tokens (none, one and two are counted beside the first), and longer ones.
TEXTS = ["a", "ab", "abc", "two words", "Question: what is 17 + 4?\nAnswer:", "wordy " * 12, "über 漢字"]


def read(model, row, modules):
    """The modules' inputs for one prompt alone, without the first token if there is another, (T, d_in)."""
    found = inputs_of(model, modules, lambda: model(torch.tensor([row])))
    return {module: x[1:] if len(row) > 1 else x for module, x in found.items()}


def squared_cosines(inputs, update):
    """How much of each token's input lies where an update reads, (T,)."""
    _, s, vh = np.linalg.svd(update, full_matrices=False)
    return (inputs @ vh.T) ** 2 @ (s / s.sum()) / (inputs**2).sum(1)


def test_both_responses_equal_dense_cosines_token_by_token(base, tiny_base, adapters, tiny_library):
    protos, rows = prototypes(adapters), encode(base.tokenizer, TEXTS)
    assert [len(row) for row in rows][:3] == [1, 2, 3]
    means, _ = input_means(base.model, rows, 0, list(protos))
    found = probe(base.model, rows, 0, protos, means, 3).responses
    assert found.shape == (len(TEXTS), 3, 14, 2) and found.dtype == np.float32
    torch.set_default_dtype(torch.bfloat16)  # as while a reload loads a model in another thread
    try:
        again = probe(base.model, rows, 0, protos, means, 3).responses
    finally:
        torch.set_default_dtype(torch.float32)
    np.testing.assert_array_equal(again, found)
    plain = plain_model(tiny_base, dtype=torch.float64)
    inputs = [read(plain, row, list(protos)) for row in rows]
    updates = [dense_updates(tiny_library / name) for name in NAMES]
    for m, module in enumerate(protos):
        mean = np.concatenate([x[module] for x in inputs]).mean(0)
        np.testing.assert_allclose(means[module], mean, atol=1e-5, rtol=1e-4)
        for i, own in enumerate(updates):
            if module not in own:
                assert np.isnan(found[:, i, m]).all()
                continue
            for q, x in enumerate(inputs):
                squares = squared_cosines(x[module] - mean, own[module])
                expected = [np.mean(squares), np.mean(squares[-2:])]
                np.testing.assert_allclose(found[q, i, m], np.sqrt(expected), rtol=1e-3, atol=1e-5)


def test_the_confidence_is_that_of_the_whole_model(base, adapters):
    """Prompt by prompt, without a batch: the log-probability of the likeliest next token."""
    protos = prototypes(adapters)
    rows = [[7, 9, 11], [5] * 9, [200, 3]]
    means, again = input_means(base.model, rows, 0, list(protos))
    found = probe(base.model, rows, 0, protos, means, 3).confidence
    with torch.inference_mode():
        for row, confidence in zip(rows, found, strict=True):
            logits = base.model(input_ids=torch.tensor([row])).logits[0, -1].double()
            assert confidence == pytest.approx(float(logits.max() - logits.logsumexp(-1)), abs=1e-5)
    torch.testing.assert_close(again, torch.from_numpy(found))
