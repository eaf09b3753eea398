"""Hooks are gone after their block, whatever happened."""

import pytest
import torch

from helpers import logits
from router.model.hooks import changing_outputs, reading_inputs

QUERY, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("names", [[QUERY, DOWN], [QUERY, "model.none"]])
def test_an_error_leaves_no_hook_behind(base, names):
    before = logits(base.model)
    seen = []
    for block in (
        reading_inputs(base.model, names, lambda name, x: seen.append(x)),
        changing_outputs(base.model, dict.fromkeys(names, lambda x, out: 0 * out)),
    ):
        with pytest.raises((KeyboardInterrupt, AttributeError)), block:
            raise KeyboardInterrupt
        assert torch.equal(logits(base.model), before) and not seen
