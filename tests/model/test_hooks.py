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


@pytest.fixture()
def theirs(model):
    """How many hooks transformers keeps on the model to return hidden states."""
    run(model)
    return hooks(model)


# Each context manager on the model, by name.
BLOCKS = {
    "reading": lambda model: reading_inputs(model, [QUERY, DOWN], lambda name, x: None),
    "changing": lambda model: changing_outputs(model, {QUERY: lambda x, out: out, DOWN: lambda x, out: out}),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_hooks_are_there_in_the_block_and_gone_after_it(model, theirs, kind):
    with BLOCKS[kind](model):
        assert hooks(model) == theirs + 2
    assert hooks(model) == theirs
    before = run(model).logits
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), BLOCKS[kind](model):
            raise error
        assert hooks(model) == theirs and torch.equal(run(model).logits, before)


@pytest.mark.parametrize(
    "block",
    [
        lambda model: reading_inputs(model, [QUERY, "model.none"], lambda name, x: None),
        lambda model: changing_outputs(model, dict.fromkeys([QUERY, "model.none"], lambda x, out: out)),
    ],
)
def test_a_module_that_is_not_there_leaves_no_hook(model, theirs, block):
    with pytest.raises(AttributeError, match="none"), block(model):
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
