import numpy as np
import torch

from merge.factors import dense
from router.adapters import load_library
from router.base import load_base
from router.predict import encode
from router.probe import input_means, probe
from router.prototypes import prototypes

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
