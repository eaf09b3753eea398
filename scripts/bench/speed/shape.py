"""Mistral-7B-shaped models of one and of five layers, random weights, and what 32 layers would cost.

A layer's cost is a quarter of the difference between the two, so the vocabulary's matrices are counted
once. On this machine all is measured; an A6000 is taken to reach the same share of its published rate and
bandwidth as this machine of its own measured ones.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from router.model.apply import active
from router.model.base import linear_shapes, ready
from router.model.cache import read_prompts
from router.plan.speed import step
from router.routing.probe import input_means, probe
from router.routing.prototypes import prototypes
from router.routing.variants import Variant, write_variant
from scripts.bench.libraries import empty_cache, uniform
from scripts.bench.timer import repeated

LAYERS, ADAPTERS, RANK = 32, 27, 16
FEW, MANY = 1, 5  # layers that are measured
PROMPTS, LENGTH = 4, 128
WRITING, STEPS = 16, 4  # rows of a batch that writes, and how many steps are timed
NAME = "random/mistral"


def _build(layers: int) -> Any:
    config = MistralConfig(num_hidden_layers=layers)  # the defaults are Mistral-7B-v0.1's
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return ready(MistralForCausalLM(config), "cpu")
    finally:
        torch.set_default_dtype(before)


def shape(layers: str) -> dict[str, Any]:
    """Median seconds of each step for a model of so many layers.

    Returns:
        probe: a token of a prompt, with all adapters' prototypes; read: without; write: a step of 16 rows;
        prototypes: of all adapters; variant: a mix of three, summed, written, loaded by PEFT and taken out;
        gemm_flops: FLOP/s of the largest product alone, 512 tokens through an up projection.
    """
    model, pad = _build(int(layers)), 0
    rows = torch.randint(5, 30000, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(2))
    mask, tokens, shapes = torch.ones_like(rows), rows.numel(), linear_shapes(model)
    base: Any = SimpleNamespace(model=model, name=NAME, revision=None)
    up = model.model.layers[0].mlp.up_proj.weight
    x = torch.randn(tokens, up.shape[1]).to(up.dtype)

    def seconds(work: Callable[[], Any], times: int = 3) -> float:
        return repeated(work, times).median

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        adapters = uniform(model, NAME, RANK, ADAPTERS, folder / "library")

        def decompose() -> Any:
            with empty_cache():
                return prototypes(adapters, "cpu", torch.bfloat16)

        protos = decompose()
        means = input_means(model, rows[:1].tolist(), pad, list(protos))
        names = [adapter.name for adapter in adapters[:3]]
        mix = Variant(dict(zip(names, (0.6, 0.3, 0.1), strict=True)), 0.0)

        def swap() -> None:
            write_variant(folder / "variant", mix, adapters, base, shapes)
            with active(base, folder / "variant"):
                pass

        found = {
            "prototypes": seconds(decompose),
            "variant": seconds(swap),
            "probe": seconds(lambda: probe(model, rows.tolist(), pad, protos, means, ADAPTERS)) / tokens,
        }
        with torch.inference_mode(), active(base, folder / "variant") as variant:
            found["read"] = seconds(lambda: read_prompts(variant, rows, mask, 1)) / tokens
            found["write"] = seconds(step(variant, LENGTH, WRITING), STEPS)
    flops = 2 * tokens * up.numel() / seconds(lambda: torch.nn.functional.linear(x, up), 9)
    linear = sum(d_out * d_in for d_out, d_in in shapes.values())
    return {**found, "gemm_flops": flops, "linear": linear, "head": model.lm_head.weight.numel()}
