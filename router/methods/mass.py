"""`mass`: a query goes to the adapters whose input subspaces leave the smallest residual of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from merge.factors import support
from router.library.adapters import Adapter, last_block
from router.model.answer import Rows
from router.model.base import decoder_prefix
from router.model.hooks import reading_inputs
from router.model.passes import batches, forward
from router.pipeline.result import Routing
from router.pipeline.steps import Method, largest, without_base
from router.queries.submission import Query
from router.routing.clusters import Array

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The authors' settings (crisostomi/mass): they keep the tasks of more than this weight, the best one in any
# case, and at most three.
THRESHOLD = 0.2
MAX_ADAPTERS = 3
TEMPERATURE = 1.0
_EPSILON = 1e-6  # the authors', added to the standard deviation


class Mass(Method):
    """Crisostomi et al. 2026, MASS: MoErging through Adaptive Subspace Selection, arXiv 2504.05342.

    The residual of task i is `r_i = norm(x - V_i V_i^T x)`, with x the query's features at one layer and V_i
    the right singular vectors of task i's update there. The weights are the softmax of `-r`, z-scored
    across tasks. Tasks of more weight than 0.2 are selected: at most three, and always the best.

    The paper is about CLIP. This is how it is transferred to language models:

    - Features are the mean over the prompt's tokens at the last block, both as in the authors' code for
      language models, which reads the inputs of one module, down_proj.
    - Adapters may have no module in common. So `-r` is z-scored at each module of that block among the
      adapters that change it, averaged over each adapter's modules, and z-scored again. With one module
      for all adapters, this is the paper's formula.
    - As in the paper, all V_i of a module have one rank, since a larger one leaves a smaller residual. It
      is an equal share of the width, but no more than the smallest rank there.
    - The first pass runs the base model, which is the authors' option without a merged model; their
      default is a TSV merge.
    - The selected weights are rescaled to sum to 1 and mix the updates. The paper merges the selected
      tasks by TSV, without weights.
    """

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """Weighs at most three adapters; the base model has no weight."""
        with self.stages("subspaces"):
            spaces = subspaces(self.adapters, str(self.base.model.device), decoder_prefix(self.base.model))
        with self.stages("probe"):
            pad = self.tokenizer.pad_token_id
            left = residuals(self.base.model, rows, pad, spaces, len(self.adapters))
        return without_base(select(left))


def subspaces(adapters: Sequence[Adapter], device: str, within: str = "") -> dict[str, dict[int, Tensor]]:
    """The first right singular vectors of each adapter at the modules of the last block.

    Returns:
        By module, adapter number -> V^T, (k, d_in) float32; k is the same for all adapters at a module.
    """
    directions = {}
    for module in last_block(adapters, within):
        here = {n: adapter for n, adapter in enumerate(adapters) if module in adapter.folder.shapes}
        vhs = {n: support(adapter.read(module))[2] for n, adapter in here.items()}
        vhs = {n: vh for n, vh in vhs.items() if len(vh)}
        if vhs:
            share = max(1, next(iter(vhs.values())).shape[1] // len(vhs))
            k = min(share, *map(len, vhs.values()))
            directions[module] = {n: vh[:k].to(device, torch.float32) for n, vh in vhs.items()}
    return directions


def residuals(
    model: PreTrainedModel, rows: Rows, pad_id: int, spaces: Mapping[str, Mapping[int, Tensor]],
    n_adapters: int,
) -> Array:  # fmt: skip
    """`norm(x - V V^T x)`, where x is the mean input of a module over a prompt's tokens.

    Args:
        spaces: by module, adapter number -> V^T, (r, d_in).

    Returns:
        (prompts, adapters, modules); NaN where an adapter does not change a module.
    """
    out = np.full((len(rows), n_adapters, len(spaces)), np.nan)

    def read(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        share = (mask / mask.sum(1, keepdim=True)).float()  # (B, T)
        means: dict[str, Tensor] = {}

        def note(module: str, x: Tensor) -> None:
            tokens = x.view(*mask.shape, -1)  # (B, T, d_in); shared experts get (B * T, d_in)
            means[module] = torch.einsum("bt,btd->bd", share, tokens.float())

        with reading_inputs(model, list(spaces), note):
            forward(model, ids, mask)
        return means

    for numbers, means in batches(model, rows, pad_id, "probe", read):
        for m, (module, vhs) in enumerate(spaces.items()):
            x = means[module]  # (B, d_in)
            for n, vh in vhs.items():
                out[numbers, n, m] = (x - (x @ vh.T) @ vh).norm(dim=1).cpu().numpy()
    return out


def select(left: Array) -> Array:
    """From residuals (prompts, adapters, modules) to weights (prompts, adapters).

    Where no adapter has a residual, since none changes the last block, all have the same weight.
    """
    scores = _standard(np.ma.masked_invalid(-left)).mean(2)  # (prompts, adapters)
    logits = (_standard(scores) / TEMPERATURE).filled(-np.inf)
    logits[np.isinf(logits).all(1)] = 0.0
    weights = np.exp(logits - logits.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    kept = largest(weights, 1) | ((weights > THRESHOLD) & largest(weights, MAX_ADAPTERS))
    chosen = np.where(kept, weights, 0.0)
    return np.asarray(chosen / chosen.sum(1, keepdims=True))


def _standard(values: Any) -> Any:
    """z-scores of a masked array across the adapters (axis 1) that are there; 0 if there is only one."""
    deviation = values.std(1, ddof=1, keepdims=True).filled(0.0)
    return (values - values.mean(1, keepdims=True)) / (deviation + _EPSILON)
