"""Mistral-7B-shaped models of one and of five layers, random weights, and what 32 layers would cost.

A layer's cost is a quarter of the difference between the two, so the vocabulary's matrices are counted
once. On this machine all is measured; an A6000 is taken to reach the same share of its published rate and
bandwidth as this machine of its own measured ones. Seconds are processor time, each thread's share of it, so
that other processes on the machine count little.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from router.model.apply import active
from router.model.base import linear_shapes, ready
from router.model.cache import read_prompts, read_token
from router.routing.probe import input_means, probe
from router.routing.prototypes import prototypes
from router.routing.variants import Variant, write_variant
from scripts.bench.libraries import empty_cache, uniform

LAYERS, ADAPTERS, RANK = 32, 27, 16
FEW, MANY = 1, 5  # layers that are measured
PROMPTS, LENGTH = 4, 128
WRITING, STEPS = 16, 4  # rows of a batch that writes, and how many steps are timed
NAME = "random/mistral"


def build(layers: int, **config: Any) -> Any:
    """A Mistral of so many layers with seeded random weights in bfloat16.

    Args:
        config: what differs from Mistral-7B-v0.1, whose settings are the defaults.
    """
    settings = MistralConfig(num_hidden_layers=layers, **config)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return ready(MistralForCausalLM(settings), "cpu")
    finally:
        torch.set_default_dtype(before)


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The median of so many calls, after one that warms up: processor time by the number of threads."""
    found = []
    for _ in range(times + 1):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return median(found[1:]) / torch.get_num_threads()


def step(model: Any) -> Callable[[], Any]:
    """A step in which WRITING rows write one token each, after prompts of LENGTH tokens."""
    ids = torch.full((WRITING, LENGTH), 5, device=model.device)
    mask = torch.ones_like(ids)
    _, cache = read_prompts(model, ids, mask, 64)

    def one() -> Any:
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return read_token(model, ids[:, 0], mask, cache)

    return one


def shape(layers: str) -> dict[str, Any]:
    """Median seconds of each step for a model of so many layers.

    Returns:
        probe: a token of a prompt, with all adapters' prototypes; read: without; write: a step of 16 rows;
        prototypes: of all adapters; variant: a mix of three, summed, written, loaded by PEFT and taken out;
        gemm_flops: FLOP/s of the largest product alone, 512 tokens through an up projection;
        bytes: read in a second.
    """
    model, pad = build(int(layers)), 0
    rows = torch.randint(5, 30000, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(2))
    mask, tokens, shapes = torch.ones_like(rows), rows.numel(), linear_shapes(model)
    base: Any = SimpleNamespace(model=model, name=NAME, revision=None)
    up = model.model.layers[0].mlp.up_proj.weight
    x = torch.randn(tokens, up.shape[1]).to(up.dtype)

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
            found["write"] = seconds(step(variant), STEPS)
    block = torch.randn(64 << 20)
    found["gemm_flops"] = 2 * tokens * up.numel() / seconds(lambda: torch.nn.functional.linear(x, up), 9)
    found["bytes"] = block.numel() * 4 / seconds(block.sum, 9)
    linear = sum(d_out * d_in for d_out, d_in in shapes.values())
    return {**found, "linear": linear, "head": model.lm_head.weight.numel()}
