"""Measures how fast this device runs a base model of a given configuration, without the model.

It measures models with random weights at two numbers of layers, and scales the difference to all layers. The
larger of the two has all layers if the base model is small.
"""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from merge.folders import AdapterFolder

LARGEST = 300_000_000  # the most parameters that a measured model may have
PROMPTS = 12  # in the sample that is read
ROWS = 16  # in the batch for which writing is measured


@dataclass(frozen=True)
class Speed:
    """Seconds on this device.

    Attributes:
        read: per prompt token, in a pass of the base model.
        read_active: the same with an adapter active.
        probe: per prompt token, in a pass that also measures all adapters' prototypes.
        write: per step in which each row of a batch writes one token, whatever the number of rows, with an
            adapter active.
        write_row: what each row adds to that.
        swap: per adapter that is written and loaded; less if it replaces one like it.
        prototypes: per adapter.
    """

    read: float
    read_active: float
    probe: float
    write: float
    write_row: float
    swap: float
    prototypes: float


def _timed(work: Callable[[], Any]) -> float:
    work()  # warm-up
    found = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return sorted(found)[1]


def skeleton(config: Any) -> Any:
    """A model of this configuration without its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        return build(config)


def parameters(model: Any) -> int:
    """How many parameters a model has; those that two layers share count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def measure(
    config: Any,
    n_parameters: int,
    device: str,
    dtype: Any,
    apply: Literal["merged", "beside"],
    adapters: dict[str, AdapterFolder],
    lengths: Sequence[int],
) -> Speed:
    """Measures a model with as many layers as LARGEST allows and one with half of them, and scales to all.

    Args:
        n_parameters: of the model with all its layers.
        lengths: tokens of each prompt; a sample is measured.
    """
    import numpy as np

    layers = config.num_hidden_layers
    most = min(layers, max(2, LARGEST * layers // n_parameters))
    sample = [int(n) for n in np.quantile(lengths or [1], (np.arange(PROMPTS) + 0.5) / PROMPTS)]
    least = max(1, most // 2)
    few, more = (_measure(config, n, device, dtype, apply, adapters, sample) for n in (least, most))
    step = (layers - least) / max(1, most - least)
    scaled = {key: few[key] + max(0.0, more[key] - few[key]) * step for key in few}
    return Speed(**scaled, prototypes=_decomposed(middle(adapters)) if adapters else 0.0)


def middle(adapters: dict[str, AdapterFolder]) -> AdapterFolder:
    """The adapter of middle size."""
    return sorted(adapters.values(), key=lambda folder: sum(folder.ranks.values()))[len(adapters) // 2]


def _measure(
    config: Any,
    layers: int,
    device: str,
    dtype: Any,
    apply: Literal["merged", "beside"],
    adapters: dict[str, AdapterFolder],
    lengths: list[int],
) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from router.model.answer import positions
    from router.model.base import ready
    from router.model.passes import batches, forward, truncated
    from router.routing.probe import probe

    small = copy.deepcopy(config)
    small.num_hidden_layers = layers
    build: Any = AutoModelForCausalLM.from_config
    model = ready(build(small, dtype=dtype), device)
    generator, room = torch.Generator().manual_seed(0), max(1, positions(model) - 4)  # for a step, four times
    rows = [
        torch.randint(
            5, config.get_text_config(decoder=True).vocab_size, (min(n, room),), generator=generator
        ).tolist()
        for n in lengths
    ]
    protos, means = _drawn(model, adapters, generator)

    def read(by: Any) -> None:
        for _, logits in batches(by, rows, 0, None, partial(forward, by)):
            logits.sum().item()

    tokens, short = sum(map(len, rows)), truncated(rows)
    with torch.inference_mode():
        found = {"read": _timed(lambda: read(model)) / tokens}
        seen = _timed(lambda: probe(model, short, 0, protos, means, len(adapters), "measure"))
        found["probe"] = seen / sum(map(len, short))
        with _one_active(model, apply, adapters) as (by, found["swap"]):
            found["read_active"] = _timed(lambda: read(by)) / tokens
            one, many = (_timed(step(by, tokens // len(rows), count)) for count in (1, ROWS))
    found["write_row"] = max(0.0, many - one) / (ROWS - 1)
    found["write"] = one - found["write_row"]
    return found


def _drawn(model: Any, adapters: dict[str, AdapterFolder], generator: Any) -> tuple[Any, Any]:
    """Random prototypes of the adapters' ranks for the model's modules, and mean inputs of 0."""
    import torch

    from router.model.base import linear_shapes
    from router.routing.prototypes import ModulePrototypes

    protos, means, like = {}, {}, next(model.parameters())
    for module, (_, d_in) in linear_shapes(model).items():
        ranks = [folder.ranks.get(module, 0) for folder in adapters.values()]
        if sum(ranks):
            owners = torch.arange(len(ranks)).repeat_interleave(torch.tensor(ranks))
            directions = torch.randn(d_in, sum(ranks), generator=generator).to(like)
            protos[module] = ModulePrototypes(
                directions, torch.ones(sum(ranks), device=like.device), owners.to(like.device)
            )
            means[module] = torch.zeros(d_in, device=like.device)
    return protos, means


@contextmanager
def _one_active(
    model: Any, apply: Literal["merged", "beside"], adapters: dict[str, AdapterFolder]
) -> Iterator[tuple[Any, float]]:
    """The model with an adapter of middle size active, and the seconds that took; plain without adapters.

    Each kind of module that this adapter changes ("q_proj") is changed in every layer of the model, which may
    have few.
    """
    if not adapters:
        yield model, 0.0
        return
    import torch

    from merge.factors import Factors
    from merge.folders import write_adapter
    from router.model.apply import applied
    from router.model.base import Base, linear_shapes

    ranks = {module.rsplit(".", 1)[-1]: rank for module, rank in middle(adapters).ranks.items()}
    updates = {
        module: Factors(torch.zeros(ranks[kind], d_in), torch.ones(d_out, ranks[kind]))
        for module, (d_out, d_in) in linear_shapes(model).items()
        if (kind := module.rsplit(".", 1)[-1]) in ranks
    }
    nameless: Any = None
    base = Base(model, nameless, "", None, "")
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one"
        write_adapter(one, updates, "", None, model.dtype)
        with applied(base, apply) as models:
            models.activate(one)  # the first time includes imports, or a copy of the weights
            models.activate(None)
            start = time.perf_counter()
            write_adapter(one, updates, "", None, model.dtype)
            by = models.activate(one)
            yield by, time.perf_counter() - start


def step(model: Any, length: int, rows: int) -> Callable[[], None]:
    """A step in which `rows` rows write one token each, after prompts of `length` tokens."""
    import torch

    from router.model.cache import cache_argument, read_prompts

    ids = torch.full((rows, length), 5, device=model.device)
    mask = torch.ones_like(ids)
    _, cache = read_prompts(model, ids, mask, 64)

    def one() -> None:
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        told = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1, "use_cache": True}
        model(input_ids=ids[:, :1], **told, **{cache_argument(model): cache}).logits.sum().item()

    return one


def _decomposed(adapter: AdapterFolder) -> float:
    from merge.factors import stacks, svd

    return _timed(lambda: [svd(stack) for _, stack in stacks(adapter.read_all())])
