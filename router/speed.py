"""How fast this device runs a base model of a given configuration, without the model.

Models with random weights are measured: with all layers where that is small, and else with two numbers of
layers, whose difference is scaled to all of them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merge.folders import AdapterFolder

LARGEST = 300_000_000  # parameters of a model that is measured
ROWS = 16  # of the batch in which writing is measured


@dataclass(frozen=True)
class Speed:
    """Seconds on this device.

    Attributes:
        read: of a prompt token in a pass of the base model.
        probe: of a prompt token with all adapters' prototypes measured on the way.
        write: of a step in which a batch writes a token each, whatever its size.
        write_row: what each row adds to that.
        prototypes: of one adapter.
        swap: of a variant written, loaded and taken out again.
    """

    read: float
    probe: float
    write: float
    write_row: float
    prototypes: float
    swap: float


def _timed(work: Callable[[], Any]) -> float:
    work()  # warm
    found = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return sorted(found)[1]


def parameters(config: Any) -> int:
    """How many a model of this configuration has."""
    import torch
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build(config).parameters())


def measure(config: Any, device: str, dtype: Any, adapters: dict[str, AdapterFolder], length: int) -> Speed:
    """Measures a model of as many layers as LARGEST allows and one of half of them, and scales to all.

    Args:
        length: tokens of a typical prompt.
    """
    layers = config.num_hidden_layers
    most = min(layers, max(2, LARGEST * layers // parameters(config)))
    few, more = (_measure(config, n, device, dtype, adapters, length) for n in (most // 2, most))
    step = (layers - most // 2) / (most - most // 2)
    scaled = {key: few[key] + max(0.0, more[key] - few[key]) * step for key in few}
    return Speed(**scaled, **_adapter_speed(adapters))


def _measure(
    config: Any, layers: int, device: str, dtype: Any, adapters: dict[str, AdapterFolder], length: int
) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from router.base import linear_shapes
    from router.cache import cache_argument, read_prompts, tokens_at_once
    from router.probe import probe
    from router.prototypes import ModulePrototypes

    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    build: Any = AutoModelForCausalLM.from_config
    model = build(small, dtype=dtype).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    rows = max(1, tokens_at_once(model.device) // length)
    ids = torch.randint(5, config.vocab_size, (2 * rows, length), generator=generator)
    protos, means = {}, {}
    for module, (_, d_in) in linear_shapes(model).items():
        ranks = [folder.ranks.get(module, 0) for folder in adapters.values()]
        if sum(ranks):
            owners = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            directions = torch.randn(d_in, sum(ranks), generator=generator).to(device, dtype)
            protos[module] = ModulePrototypes(
                directions, torch.ones(sum(ranks), device=device), owners.to(device)
            )
            means[module] = torch.zeros(d_in, device=device)

    def write(count: int) -> float:
        batch = ids[:1].repeat(count, 1).to(device)
        mask = torch.ones_like(batch)
        _, cache = read_prompts(model, batch, mask, 64)

        def step() -> None:
            nonlocal mask
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            told = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, "use_cache": True}
            model(input_ids=batch[:, :1], **told, **{cache_argument(model): cache}).logits.sum().item()

        return _timed(step)

    with torch.inference_mode():
        whole = ids.to(device)
        read = _timed(lambda: read_prompts(model, whole, torch.ones_like(whole), 1)[0].sum().item())
        one, many = write(1), write(ROWS)
    rate = max(0.0, many - one) / (ROWS - 1)
    seen = _timed(lambda: probe(model, ids.tolist(), 0, protos, means, len(adapters), "measure"))
    return {"read": read / ids.numel(), "probe": seen / ids.numel(), "write": one - rate, "write_row": rate}


def _adapter_speed(adapters: dict[str, AdapterFolder]) -> dict[str, float]:
    """Seconds of decomposing, and of writing and loading, one adapter; by the one of middle size."""
    if not adapters:
        return {"prototypes": 0.0, "swap": 0.0}
    from merge.factors import stacks, svd

    folders = sorted(adapters.values(), key=lambda folder: sum(folder.ranks.values()))
    middle = folders[len(folders) // 2]
    decomposed = _timed(lambda: [svd(stack) for _, stack in stacks(middle.read_all())])
    return {"prototypes": decomposed, "swap": 4 * _timed(lambda: list(middle.read_all())) + 0.1}
