import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from merge.factors import dense
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import load_base
from router.routing.probe import input_means, last_of, probe
from router.routing.prototypes import prototypes

TEXTS = ["a", "two words", "Question: what is 17 + 4?\nAnswer:", "x" * 70, "über 漢字"]


def inputs_of(base, text, module):
    """The module's input for one prompt alone, without the first token, (T, d_in) float64."""
    seen = []
    handle = base.model.get_submodule(module).register_forward_hook(lambda m, args, out: seen.append(args[0]))
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        base.model(ids)
    handle.remove()
    return seen[0][0, min(1, ids.shape[1] - 1) :].double()


def test_responses_equal_dense_cosines_prompt_by_prompt(tiny_base, tiny_library):
    base = load_base(str(tiny_base), "cpu", "float32")
    adapters = load_library([str(tiny_library)])
    protos = prototypes(adapters)
    rows = encode(base.tokenizer, TEXTS)
    means = input_means(base.model, rows, 0, list(protos))
    found = probe(base.model, rows, 0, protos, means, len(adapters)).responses
    assert found.shape == (len(TEXTS), 3, 14)
    for m, module in enumerate(protos):
        inputs = [inputs_of(base, text, module) for text in TEXTS]
        mean = torch.cat(inputs).mean(0)
        torch.testing.assert_close(means[module].double(), mean, atol=1e-5, rtol=1e-4)
        for i, adapter in enumerate(adapters):
            updates = dict(adapter.read_all())
            if module not in updates:
                assert np.isnan(found[:, i, m]).all()
                continue
            _, s, vh = torch.linalg.svd(dense(updates[module]).double(), full_matrices=False)
            s, vh = s[: updates[module].rank], vh[: updates[module].rank]
            for q, x in enumerate(inputs):
                x = x - mean
                cosine = ((x @ vh.T).square() @ (s / s.sum())).sqrt() / x.norm(dim=1)
                np.testing.assert_allclose(found[q, i, m], cosine.mean().item(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("budget", [4096, 40])  # all prompts in one batch; in several
def test_the_end_of_a_prompt_is_where_a_plain_model_ends_on_it_alone(
    budget, tiny_base, tiny_library, monkeypatch
):
    monkeypatch.setattr("router.model.cache.CPU_TOKENS", budget)
    base = load_base(str(tiny_base), "cpu", "float32")
    protos = prototypes(load_library([str(tiny_library)]))
    rows = encode(base.tokenizer, TEXTS)
    means = input_means(base.model, rows, 0, list(protos))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    for found in (last_of(base.model, rows, 0), probe(base.model, rows, 0, protos, means, 3).last):
        assert found.hidden.shape == (len(rows), 32) and found.confidence.shape == (len(rows),)
        for row, hidden, confidence in zip(rows, *found, strict=True):
            with torch.no_grad():
                out = plain(input_ids=torch.tensor([row]), output_hidden_states=True)
            torch.testing.assert_close(hidden, out.hidden_states[-1][0, -1], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(confidence, out.logits[0, -1].log_softmax(0).max(), atol=1e-4, rtol=0)
