"""A trial says what PEFT's own loader says, prompt by prompt, and leaves the base model as it was."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from helpers import write_tiny_adapter
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import load_base
from router.routing.probe import last_of
from router.routing.trial import trial

TEXTS = ["a", "two words", "Question: what is 17 + 4?\nAnswer:", "x" * 70, "über 漢字"]
SHORTLIST = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 0], [0, 0, 0], [1, 0, 1]], dtype=bool)
PREFIX = "base_model.model."


@pytest.fixture()
def base(tiny_base):
    return load_base(str(tiny_base), "cpu", "float32")


def tried(base, adapters, shortlist):
    rows = encode(base.tokenizer, TEXTS)
    return trial(base, adapters, rows, last_of(base.model, rows, 0), shortlist)


def end_of(model, row):
    """Final hidden state and log-probability of the likeliest next token of one prompt alone."""
    with torch.no_grad():
        out = model(input_ids=torch.tensor([row]), output_hidden_states=True)
    return out.hidden_states[-1][0, -1].double(), float(out.logits[0, -1].double().log_softmax(0).max())


def test_effect_and_confidence_are_those_of_peft_prompt_by_prompt(tiny_base, tiny_library, base):
    adapters, rows = load_library([str(tiny_library)]), encode(base.tokenizer, TEXTS)
    found = tried(base, adapters, np.ones((5, 3), dtype=bool))
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    before = [end_of(plain, row) for row in rows]
    np.testing.assert_allclose(found.base_confidence, [confidence for _, confidence in before], atol=1e-4)
    for n, adapter in enumerate(adapters):
        fresh = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        theirs = PeftModel.from_pretrained(fresh, tiny_library / adapter.name).eval()
        for q, (row, (hidden, _)) in enumerate(zip(rows, before, strict=True)):
            changed, confidence = end_of(theirs, row)
            effect = float((changed - hidden).norm() / hidden.norm())
            assert found.effect[q, n] == pytest.approx(effect, rel=1e-3) and effect > 0.1
            assert found.confidence[q, n] == pytest.approx(confidence, abs=1e-4)


def test_only_the_shortlist_is_tried_and_it_is_the_same(tiny_library, base):
    adapters = load_library([str(tiny_library)])
    some, all_of_them = tried(base, adapters, SHORTLIST), tried(base, adapters, np.ones_like(SHORTLIST))
    for part, whole in ((some.effect, all_of_them.effect), (some.confidence, all_of_them.confidence)):
        np.testing.assert_array_equal(np.isnan(part), ~SHORTLIST)
        np.testing.assert_allclose(part[SHORTLIST], whole[SHORTLIST], rtol=1e-4)
    np.testing.assert_array_equal(some.base_confidence, all_of_them.base_confidence)


def test_the_base_model_is_as_before_bit_for_bit(tiny_library, base):
    ids = torch.tensor([[5, 60, 7, 91, 12, 200, 33]])
    with torch.no_grad():
        before = base.model(input_ids=ids).logits.clone()
        weights = {key: value.clone() for key, value in base.model.state_dict().items()}
        tried(base, load_library([str(tiny_library)]), np.ones_like(SHORTLIST))
        assert torch.equal(base.model(input_ids=ids).logits, before)
    after = base.model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], value) for key, value in weights.items())


def only(part):
    return lambda tensors: {key: value for key, value in tensors.items() if part in key}


# Each of these the library accepts and a variant is made of, and PEFT's loader does not read as it is.
ODD = {
    "no_prefix": (lambda tensors: {key.removeprefix(PREFIX): value for key, value in tensors.items()}, {}),
    "named": (
        lambda tensors: {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()},
        {},
    ),
    "one_layer": (only("layers.1."), {}),
    "one_kind_of_two": (only("q_proj"), {}),
    "targets_unsaid": (lambda tensors: tensors, {"target_modules": None}),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_adapter_is_tried_as_it_would_answer(tmp_path, base, kind):
    folder = write_tiny_adapter(tmp_path / "odd", 1, kinds=("self_attn.q_proj", "mlp.up_proj"))
    change, config = ODD[kind]
    tensors = change(load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    adapters, rows = load_library([str(folder)]), encode(base.tokenizer, TEXTS)
    before = [end_of(base.model, row)[0] for row in rows]
    found = tried(base, adapters, np.ones((5, 1), dtype=bool)).effect[:, 0]
    with torch.no_grad():
        for module, update in adapters[0].read_all():
            base.model.get_submodule(module).weight += update.b @ update.a
    for effect, row, hidden in zip(found, rows, before, strict=True):
        changed, _ = end_of(base.model, row)
        assert effect == pytest.approx(float((changed - hidden).norm() / hidden.norm()), rel=1e-3, abs=1e-5)
