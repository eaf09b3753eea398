"""`logo`: a query goes to the adapters that answer its last token most strongly at the last block."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from router.adapters import Adapter
from router.clusters import Array
from router.merges import Routed
from router.passes import batches, forward, last_block
from router.per_token import Experts, attached, load_experts, norms
from router.predict import encode
from router.submission import Query

TOP_K = 20  # the authors' default (archon159/LoGo), there of 260 adapters
PROJECTION = "q_proj"  # theirs, of the last block


def probed(adapters: Sequence[Adapter]) -> set[str]:
    """Which modules give the signal: q_proj of the last block if all adapters change it, else all there."""
    block = last_block(adapters)
    shared = [
        module
        for module in block
        if module.endswith(PROJECTION) and all(module in adapter.folder.shapes for adapter in adapters)
    ]
    return set(shared or block)


class LoGo(Routed):
    """LoRA on the Go, ACL 2026, arXiv 2511.07129, with its default signal, the norm.

    One pass over the prompt with all adapters attached, each at full weight. The signal of adapter
    i is `s_i = norm(D_i h)`, h the input of q_proj of the last block for the prompt's last token;
    the 20 largest are kept, `w_i = s_i / sum s`, and `sum_i w_i D_i` answers.

    The paper's adapters all have q_proj. Where some have not, s_i is the mean over the modules that
    adapter i changes in that block. The authors' code takes h before the block's norm, and after
    the first query attaches only the adapters that the query before was given; here h is what
    q_proj gets, as the paper says, and every query meets all adapters.
    """

    def route(self, queries: Sequence[Query]) -> Array:
        """Weights in proportion to the norms; the base model has none."""
        model, tokenizer = self.base.model, self.tokenizer
        with self.stages("experts"):
            experts = load_experts(self.adapters, str(model.device), model.dtype)
        with self.stages("probe"):
            rows = encode(tokenizer, [query.input for query in queries], self.settings.max_seq_len)
            signals = self._signals(rows, experts)
        return np.column_stack([proportional(signals, TOP_K), np.zeros(len(queries))])

    def _signals(self, rows: Sequence[Sequence[int]], experts: dict[str, Experts]) -> Array:
        """The norm of each adapter's output for each prompt's last token, (prompts, adapters)."""
        model, n, modules = self.base.model, len(self.adapters), probed(self.adapters)
        count = np.array([len(modules & adapter.folder.shapes.keys()) for adapter in self.adapters])
        total = np.zeros((len(rows), n))
        with torch.inference_mode():
            for numbers, ids, mask in batches(model, rows, self.tokenizer.pad_token_id, "probe"):
                tally = torch.zeros((len(numbers), n), device=ids.device)

                def all_of_them(
                    expert: Experts, x: Tensor, along: Tensor, mask: Tensor = mask, tally: Tensor = tally
                ) -> Tensor:
                    if expert.module in modules:
                        last = along.view(*mask.shape, -1)[:, -1]  # (B, K), padding is on the left
                        tally[:, expert.members] += norms(expert, last)
                    return x.new_ones(len(x), len(expert.members))

                with attached(model, experts, all_of_them):
                    forward(model, ids, mask)
                total[numbers] = tally.cpu().numpy()
        return np.asarray(total / count.clip(1))


def proportional(signals: Array, k: int) -> Array:
    """Each row's k largest signals divided by their sum; equal weights where all are 0."""
    ranks = (-signals).argsort(1, kind="stable").argsort(1)
    kept = np.where(ranks < k, signals, 0.0)
    kept[kept.sum(1) == 0] = 1.0
    return np.asarray(kept / kept.sum(1, keepdims=True))
