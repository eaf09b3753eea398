"""Hooks see and change what they should while the block runs, and are gone afterwards, whatever happened."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from router.model.hooks import changing_outputs, make_head_input_contiguous, reading_inputs

IDS = torch.tensor([[5, 60, 7, 91], [12, 200, 33, 4]])
QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


def run(model):
    with torch.inference_mode():
        return model(input_ids=IDS, output_hidden_states=True)


def hooks(model):
    """How many hooks there are on all modules."""
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.fixture()
def model(tiny_base):
    return AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()


# Each context manager on modules of the model, by name.
BLOCKS = {
    "reading": lambda model, names: reading_inputs(model, names, lambda name, x: None),
    "changing": lambda model, names: changing_outputs(model, dict.fromkeys(names, lambda x, out: out)),
}


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_hooks_are_there_in_the_block_and_gone_after_it(model, block):
    before = run(model).logits
    theirs = hooks(model)  # transformers keeps them to return hidden states
    with block(model, [QUERY, DOWN]):
        assert hooks(model) == theirs + 2
    assert hooks(model) == theirs
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), block(model, [QUERY, DOWN]):
            raise error
        assert hooks(model) == theirs and torch.equal(run(model).logits, before)
    with pytest.raises(AttributeError, match="none"), block(model, [QUERY, "model.none"]):
        pass
    assert hooks(model) == theirs


def test_the_head_gets_contiguous_input_and_answers_the_same(model):
    with torch.inference_mode():
        before = model(input_ids=IDS, logits_to_keep=1).logits
        make_head_input_contiguous(model)
        seen = []
        model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        after = model(input_ids=IDS, logits_to_keep=1).logits
    assert seen[0].is_contiguous() and hooks(model) == 2  # ours here and theirs, for good
    torch.testing.assert_close(after, before)
