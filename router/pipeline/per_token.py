"""Mixes adapters anew for every token and module, by hooks on the base model; merges nothing.

A module with the updates `D_i` of n adapters computes, for a token with input x,

    output = W x + sum_i w_i D_i x,    w = weights(x), in the simplest case softmax(logits(x)),

for prompts and generated tokens alike. Updates are kept as their thin SVD, `D_i = U_i (S_i V_i^T)`, which is
the same update up to rounding. Its factors give training-free routers what they need: `norm(S V^T x)` is
`norm(D x)`, `norm(V^T x)` is the length of x within the update's row space, and the first row of `V^T` is
what Arrow calls the prototype. An adapter does not compete at a module that it does not change: one that it
does not target, or where its update is zero.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from merge.factors import support
from router.library.adapters import Adapter
from router.model.answer import Answer, Rows
from router.model.hooks import Change, changing_outputs
from router.model.passes import batches, forward
from router.pipeline.answering import answered
from router.pipeline.result import Decision, Routing
from router.pipeline.steps import Method
from router.queries.submission import Query
from router.routing.clusters import Array
from router.routing.variants import Variant
from router.system.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Experts:
    """The updates of the n adapters that compete at one module, side by side.

    Attributes:
        module: the module's name.
        a: (K, d_in) the rows `S_j v_j^T` of each adapter, K the sum of ranks.
        b: (d_out, K) the columns `u_j`.
        scales: (K,) float32, the singular values `S_j`, all above rounding.
        owners: (K,) int64, which of the n adapters each row belongs to.
        arrows: (n, d_in) each adapter's first right singular vector.
        members: (n,) int64, each adapter's number in the library.
    """

    module: str
    a: Tensor
    b: Tensor
    scales: Tensor
    owners: Tensor
    arrows: Tensor
    members: Tensor


# (experts, x (T, d_in), S V^T x (T, K)) -> (T, n): logits or weights of the module's adapters
Rule = Callable[[Experts, Tensor, Tensor], Tensor]


def load_experts(adapters: Sequence[Adapter], device: str, dtype: torch.dtype) -> dict[str, Experts]:
    """The updates of a library by module; decomposed in float64, kept in `dtype`."""
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor, int]]] = {}
    for number, adapter in enumerate(adapters):
        for module, update in adapter.read_all():
            u, s, vh = support(update)
            if len(s):
                parts.setdefault(module, []).append((s[:, None] * vh, u, s, vh[:1], number))
        adapter.check_unchanged()
    by_module = {}
    for module, experts in parts.items():
        a, b, scales, arrows, members = zip(*experts, strict=True)
        ranks = torch.tensor([len(rows) for rows in a])
        by_module[module] = Experts(
            module,
            torch.cat(a).to(device, dtype),
            torch.cat(b, dim=1).to(device, dtype),
            torch.cat(scales).to(device, torch.float32),
            torch.arange(len(a)).repeat_interleave(ranks).to(device),
            torch.cat(arrows).to(device, dtype),
            torch.tensor(members, device=device),
        )
    return by_module


def arrow_scores(experts: Experts, x: Tensor) -> Tensor:
    """`abs(v_1 . x)` of each adapter, (T, n) float32."""
    return (x @ experts.arrows.T).float().abs()


def norms(experts: Experts, along: Tensor) -> Tensor:
    """`norm(S V^T x)`, which is `norm(D x)`, of each adapter, (T, n) float32."""
    membership = torch.nn.functional.one_hot(experts.owners, len(experts.members)).float()  # (K, n)
    return (along.float().square() @ membership).sqrt()  # many times faster than index_add_


def input_norms(experts: Experts, along: Tensor) -> Tensor:
    """`norm(V^T x)` of each adapter, which does not depend on its size, (T, n) float32."""
    return norms(experts, along.float() / experts.scales)


def keep_top(logits: Tensor, k: int) -> Tensor:
    """Sets all but the k largest logits of each row to minus infinity."""
    best = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)


@contextmanager
def attached(model: PreTrainedModel, experts: Mapping[str, Experts], weigh: Rule) -> Iterator[None]:
    """Adds `sum_i w_i D_i x` to the output of each module while the block runs.

    The model's weights are not touched; afterwards it is as it was. A token's weights need not sum to 1.
    """

    def add(expert: Experts) -> Change:
        def change(x: Tensor, out: Tensor) -> Tensor:
            x = x.flatten(0, -2).to(expert.a.device)  # (T, d_in)
            along = x @ expert.a.T  # (T, K)
            weights = weigh(expert, x, along).to(along.dtype)  # (T, n)
            delta = (along * weights[:, expert.owners]) @ expert.b.T  # (T, d_out)
            return out + delta.view(out.shape).to(out.device)

        return change

    with changing_outputs(model, {name: add(expert) for name, expert in experts.items()}):
        yield


def mean_weights(
    model: PreTrainedModel, rows: Rows, pad_id: int, experts: Mapping[str, Experts], weigh: Rule,
    n_adapters: int,
) -> Array:  # fmt: skip
    """Measures each prompt's weights in one pass, averaged over its tokens and all modules.

    Args:
        n_adapters: the size of the library; an adapter has weight 0 where it does not compete.

    Returns:
        (prompts, adapters); rows sum to 1 if the weights do.
    """
    out = np.zeros((len(rows), n_adapters))

    def read(ids: Tensor, mask: Tensor) -> Array:
        share = mask / mask.sum(1, keepdim=True)  # (B, T)
        tally = torch.zeros((len(ids), n_adapters), device=ids.device)
        reached = set()  # text reaches no module that sees pictures

        def noting(expert: Experts, x: Tensor, along: Tensor) -> Tensor:
            weights = weigh(expert, x, along)  # (B * T, n)
            per_token = weights.view(*share.shape, -1)
            tally[:, expert.members] += torch.einsum("bt,btn->bn", share, per_token)
            reached.add(expert.module)
            return weights

        with attached(model, experts, noting):
            forward(model, ids, mask)
        return (tally / max(1, len(reached))).cpu().numpy()

    for numbers, means in batches(model, rows, pad_id, "weights", read):
        out[numbers] = means
    return out


class PerToken(Method):
    """A method that weighs the adapters anew for every token and module.

    There is no variant to write: one entry without a folder stands for all queries, with the mean
    weights, and --n_variants and --variant_rank change nothing. The routing table has each query's
    weights, averaged over its prompt's tokens and all modules; a separate pass before the answers
    measures them. The base model has no weight of its own, since its output is always there in full.
    """

    @cached_property
    def experts(self) -> dict[str, Experts]:
        """The library by module, loaded on first use."""
        with self.stages("experts"):
            return load_experts(self.adapters, str(self.base.model.device), self.base.model.dtype)

    @abstractmethod
    def logits(self, experts: Experts, x: Tensor, along: Tensor) -> Tensor:
        """Logits of a module's n adapters for T tokens; minus infinity leaves one out.

        Args:
            experts: the module's adapters.
            x: (T, d_in) the module's input.
            along: (T, K) `S V^T x` of all adapters.

        Returns:
            (T, n) float32, at least one finite in each row.
        """

    def weigh(self, experts: Experts, x: Tensor, along: Tensor) -> Tensor:
        """The softmax of the logits, (T, n)."""
        return self.logits(experts, x, along).softmax(-1)

    @property
    def n_variants(self) -> int | None:
        """One entry for all queries."""
        return 1

    def route(self, queries: Sequence[Query], rows: Rows) -> Routing:
        """Loads the library and measures the prompts' mean weights, for the routing table."""
        experts = self.experts
        pad = self.tokenizer.pad_token_id
        with self.stages("weights"):
            means = mean_weights(self.base.model, rows, pad, experts, self.weigh, len(self.adapters))
        weights = np.column_stack([means, ~means.any(1)])  # the base model's where text reaches no expert
        return Routing(weights / weights.sum(1, keepdims=True))  # means of thousands of tokens are rounded

    def write_variants(self, variants: Sequence[Variant], folder: Path) -> list[str | None]:
        """Writes nothing: there is no merged adapter."""
        return [None] * len(variants)

    def predict(self, queries: Sequence[Query], rows: Rows, decision: Decision, folder: Path) -> list[Answer]:
        """Answers with the base model while the adapters add to its modules' outputs."""
        with (
            attached(self.base.model, self.experts, self.weigh),
            progress(total=sum(map(len, rows)), desc="predict", unit="tok") as bar,
        ):
            ends = self._ends(queries)
            answers = answered(self.base.model, self.tokenizer, queries, rows, self.context, bar.update, ends)
        return self._ended(queries, answers, [None] * len(queries))
