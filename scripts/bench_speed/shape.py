"""Mistral-7B-shaped models of one and of five layers, random weights, and what 32 layers would cost.

A layer's cost is a quarter of the difference between the two, so the vocabulary's matrices are counted
once. On this machine all is measured; an A6000 is taken to reach the same share of its published rate and
bandwidth as this machine of its own measured ones.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import MistralConfig, MistralForCausalLM

from merge.factors import Factors
from merge.folders import write_adapter
from router.adapters import Adapter, load_library
from router.base import linear_shapes, ready, sha256_of
from router.cache import read_prompts
from router.probe import input_means, probe
from router.prototypes import prototypes
from router.speed import step
from router.variants import Variant, live, write_variant
from scripts.bench_speed.clean import empty_cache

LAYERS, ADAPTERS, RANK = 32, 27, 16
FEW, MANY = 1, 5  # layers that are measured
PROMPTS, LENGTH = 4, 128
WRITING, STEPS = 16, 4  # rows of a batch that writes, and how many steps are timed


def _build(layers: int) -> Any:
    config = MistralConfig(num_hidden_layers=layers)  # the defaults are Mistral-7B-v0.1's
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return ready(MistralForCausalLM(config), "cpu")
    finally:
        torch.set_default_dtype(before)


def _adapters(model: Any, folder: Path) -> list[Adapter]:
    generator = torch.Generator().manual_seed(1)
    for n in range(ADAPTERS):
        updates = {
            module: Factors(
                torch.randn(RANK, d_in, generator=generator) / d_in**0.5,
                torch.randn(d_out, RANK, generator=generator) * 0.01,
            )
            for module, (d_out, d_in) in linear_shapes(model).items()
        }
        write_adapter(folder / f"adapter{n:02}", updates, "random/mistral", None, torch.bfloat16)
    return load_library([str(folder)])


def _prototypes(adapters: list[Adapter]) -> Any:
    with empty_cache():
        return prototypes(adapters, "cpu", torch.bfloat16)


def _timed(work: Callable[[], Any], times: int = 3) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return sorted(found)[times // 2]


def measure(layers: str) -> dict[str, Any]:
    """Median seconds of each step for a model of so many layers.

    Returns:
        probe: a token of a prompt, with all adapters' prototypes; read: without; write: a step of 16 rows;
        prototypes: of all adapters; variant: a mix of three, summed, written, loaded by PEFT and taken out;
        gemm_flops: FLOP/s of the largest product alone, 512 tokens through an up projection.
    """
    model, pad = _build(int(layers)), 0
    rows = torch.randint(5, 30000, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(2))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        adapters = _adapters(model, folder / "library")
        protos = _prototypes(adapters)
        means = input_means(model, rows[:1].tolist(), pad, list(protos))
        tokens = rows.numel()
        base: Any = SimpleNamespace(
            model=model, name="random/mistral", revision=None, sha256=sha256_of(), tokenizer=None
        )
        names = [adapter.name for adapter in adapters[:3]]
        mix, shapes = Variant(dict(zip(names, (0.6, 0.3, 0.1), strict=True)), 0.0), linear_shapes(model)

        def swap() -> None:
            write_variant(folder / "variant", mix, adapters, base, shapes)
            with live(base, folder / "variant"):
                pass

        found = {
            "prototypes": _timed(lambda: _prototypes(adapters)),
            "variant": _timed(swap),
            "probe": _timed(lambda: probe(model, rows.tolist(), pad, protos, means, ADAPTERS)) / tokens,
        }
        with torch.inference_mode(), live(base, folder / "variant") as variant:
            mask = torch.ones_like(rows)
            found["read"] = _timed(lambda: read_prompts(variant, rows, mask, 1)) / tokens
            found["write"] = _timed(step(variant, LENGTH, WRITING), STEPS + 1)
    up = model.model.layers[0].mlp.up_proj.weight
    x = torch.randn(tokens, up.shape[1]).to(up.dtype)
    found["gemm_flops"] = 2 * tokens * up.numel() / _timed(lambda: torch.nn.functional.linear(x, up), 9)
    linear = sum(d_out * d_in for d_out, d_in in linear_shapes(model).values())
    return {**found, "linear": linear, "head": model.lm_head.weight.numel()}
