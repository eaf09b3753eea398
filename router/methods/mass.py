"""`mass`: a query goes to the adapters whose input subspaces leave least of it over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge.factors import support
from router.adapters import Adapter
from router.clusters import Array
from router.merges import Routed
from router.passes import batches, forward, last_block
from router.predict import encode
from router.submission import Query

# The authors' settings (crisostomi/mass): tasks of at least this weight, the best one in any case,
# and at most three.
THRESHOLD = 0.2
MAX_ADAPTERS = 3
TEMPERATURE = 1.0
_EPSILON = 1e-6  # theirs, beside the standard deviation


class Mass(Routed):
    """Crisostomi et al. 2026, MASS: MoErging through Adaptive Subspace Selection, arXiv 2504.05342.

    `r_i = norm(x - V_i V_i^T x)` with x the query's features at one layer and V_i the right singular
    vectors of task i's update there; `softmax` of `-r`, z-scored across tasks; those of weight 0.2 or
    more, at most three, at least the best.

    The paper is about CLIP; this is how it is transferred. Features: the mean over the prompt's
    tokens, and the last block, both as in the authors' code for language models (theirs reads the
    inputs of one module, down_proj). Adapters may have no module in common, so `-r` is z-scored
    at each module of that block among the adapters that change it, averaged over each adapter's
    modules, and z-scored again; with one module for all that is the paper's formula. As in the paper
    all V_i of a module have one rank, since a larger one leaves less over: an equal share of the
    width, but no more than the smallest rank there. The first pass is the base model (the authors'
    option without a merged model; their default is a TSV merge). The selected weights are rescaled
    to sum to 1 and mix the updates; the paper merges the selected tasks by TSV, without weights.
    """

    def route(self, queries: Sequence[Query]) -> Array:
        """The weights of at most three adapters; the base model has none."""
        with self.stages("subspaces"):
            spaces = subspaces(self.adapters, str(self.base.model.device))
        with self.stages("probe"):
            texts = [query.input for query in queries]
            rows = encode(self.tokenizer, texts, self.settings.max_seq_len)
            pad = self.tokenizer.pad_token_id
            left = residuals(self.base.model, rows, pad, spaces, len(self.adapters))
        return np.column_stack([select(left), np.zeros(len(queries))])


def subspaces(adapters: Sequence[Adapter], device: str = "cpu") -> dict[str, dict[int, Tensor]]:
    """The first right singular vectors of each adapter at the modules of the last block.

    Returns:
        By module, number of the adapter to V^T, (k, d_in) float32; k is the same for all.
    """
    found = {}
    for module in last_block(adapters):
        here = {n: adapter for n, adapter in enumerate(adapters) if module in adapter.folder.shapes}
        vhs = {n: support(adapter.read(module))[2] for n, adapter in here.items()}
        vhs = {n: vh for n, vh in vhs.items() if len(vh)}
        if vhs:
            share = max(1, next(iter(vhs.values())).shape[1] // len(vhs))
            k = min(share, *map(len, vhs.values()))
            found[module] = {n: vh[:k].to(device, torch.float32) for n, vh in vhs.items()}
    return found


def residuals(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, spaces: Mapping[str, Mapping[int, Tensor]],
    n_adapters: int,
) -> Array:  # fmt: skip
    """`norm(x - V V^T x)`, x the mean input of a module over a prompt's tokens.

    Args:
        rows: token ids of each prompt.
        spaces: by module, adapter number to V^T, (r, d_in).

    Returns:
        (prompts, adapters, modules); NaN where an adapter does not change a module.
    """
    out = np.full((len(rows), n_adapters, len(spaces)), np.nan)
    with torch.inference_mode():
        for numbers, ids, mask in batches(model, rows, pad_id, "probe"):
            share = (mask / mask.sum(1, keepdim=True)).float()  # (B, T)
            means: dict[str, Tensor] = {}

            def note(module: str, x: Tensor, share: Tensor = share, means: dict[str, Tensor] = means) -> None:
                means[module] = torch.einsum("bt,btd->bd", share, x.float())

            with ExitStack() as stack:
                for name in spaces:
                    handle = model.get_submodule(name).register_forward_pre_hook(
                        lambda _, args, name=name, note=note: note(name, args[0])
                    )
                    stack.callback(handle.remove)
                forward(model, ids, mask)
            for m, (module, vhs) in enumerate(spaces.items()):
                x = means[module]  # (B, d_in)
                for n, vh in vhs.items():
                    out[numbers, n, m] = (x - (x @ vh.T) @ vh).norm(dim=1).cpu().numpy()
    return out


def select(left: Array) -> Array:
    """From residuals (prompts, adapters, modules) to weights (prompts, adapters)."""
    scores = _standard(-left)
    present = ~np.isnan(scores)
    totals = np.where(present, scores, 0.0).sum(2) / present.sum(2).clip(1)  # (prompts, adapters)
    logits = _standard(np.where(present.any(2), totals, np.nan)) / TEMPERATURE
    logits = np.where(np.isnan(logits), -np.inf, logits)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    ranks = (-weights).argsort(1, kind="stable").argsort(1)
    kept = (ranks == 0) | ((weights > THRESHOLD) & (ranks < MAX_ADAPTERS))
    chosen = np.where(kept, weights, 0.0)
    return np.asarray(chosen / chosen.sum(1, keepdims=True))


def _standard(values: Array) -> Array:
    """z-scores across adapters (axis 1) of those that are there; 0 for one alone."""
    there = ~np.isnan(values)
    count = there.sum(1, keepdims=True)
    mean = np.where(there, values, 0.0).sum(1, keepdims=True) / count.clip(1)
    squares = np.where(there, values - mean, 0.0) ** 2
    deviation = np.sqrt(squares.sum(1, keepdims=True) / (count - 1).clip(1))
    return np.asarray((values - mean) / (deviation + _EPSILON))
