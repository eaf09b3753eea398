"""`logo`: a query goes to the adapters whose updates respond most to its last token, at the last block."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from router.library.adapters import Adapter, last_block
from router.model.answer import Rows
from router.model.base import decoder_prefix
from router.model.passes import batches, forward
from router.pipeline.per_token import Experts, attached, load_experts, norms
from router.pipeline.result import Routing
from router.pipeline.steps import Method, largest, without_base
from router.queries.submission import Query
from router.routing.clusters import Array

TOP_K = 20  # the authors' default (archon159/LoGo), for 260 adapters
PROJECTION = "q_proj"  # the authors', in the last block


def probed(adapters: Sequence[Adapter], within: str = "") -> set[str]:
    """The modules that give the signal: the last block's q_proj if all adapters change it, else all there."""
    block = last_block(adapters, within)
    shared = [
        module
        for module in block
        if module.endswith(PROJECTION) and all(module in adapter.folder.shapes for adapter in adapters)
    ]
    return set(shared or block)


class LoGo(Method):
    """LoRA on the Go, ACL 2026, arXiv 2511.07129, with its default signal, the norm.

    One pass reads the prompt with all adapters attached, each at full weight. The signal of adapter i is
    `s_i = norm(D_i h)`, where h is the input of the last block's q_proj for the prompt's last token. The
    20 largest signals are kept, `w_i = s_i / sum s`, and `sum_i w_i D_i` answers.

    The paper's adapters all have q_proj. If some do not, s_i is the mean over the modules that adapter i
    changes in that block. The authors' code takes h before the block's norm; after the first query, it
    attaches only the adapters that the previous query was given. Here h is q_proj's input, as the paper
    says, and every query meets all adapters.
    """

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """Weighs adapters in proportion to the norms; the base model has no weight."""
        model = self.base.model
        with self.stages("experts"):
            experts = load_experts(self.adapters, str(model.device), model.dtype)
        with self.stages("probe"):
            signals = self._signals(rows, experts)
        kept = np.where(largest(signals, TOP_K), signals, 0.0)
        kept[kept.sum(1) == 0] = 1.0  # equal weights where all are 0
        return without_base(kept / kept.sum(1, keepdims=True))

    def _signals(self, rows: Rows, experts: dict[str, Experts]) -> Array:
        """The norm of each adapter's output for each prompt's last token, (prompts, adapters)."""
        model = self.base.model
        n = len(self.adapters)
        modules = probed(self.adapters, decoder_prefix(model))
        count = np.array([len(modules & adapter.folder.shapes.keys()) for adapter in self.adapters])
        total = np.zeros((len(rows), n))

        def read(ids: Tensor, mask: Tensor) -> Array:
            tally = torch.zeros((len(ids), n), device=ids.device)

            def all_of_them(expert: Experts, x: Tensor, along: Tensor) -> Tensor:
                if expert.module in modules:
                    last = along.view(*mask.shape, -1)[:, -1]  # (B, K), padding is on the left
                    tally[:, expert.members] += norms(expert, last)
                return x.new_ones(len(x), len(expert.members))

            with attached(model, experts, all_of_them):
                forward(model, ids, mask)
            return tally.cpu().numpy()

        for numbers, tallies in batches(model, rows, self.tokenizer.pad_token_id, "probe", read):
            total[numbers] = tallies
        return np.asarray(total / count.clip(1))
