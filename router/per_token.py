"""Adapters mixed anew for every token and module, by hooks on the base model; nothing is merged.

At a module with the updates `D_i` of n adapters and the input x of a token

    output = W x + sum_i w_i D_i x,    w = weights(x), in the simplest case softmax(logits(x)),

for prompts and generated tokens alike. Updates are kept as `D_i = U_i (S_i V_i^T)`, their thin SVD:
the same update up to rounding, with factors that answer what training-free routers ask:
`norm(S V^T x) = norm(D x)`, without S it is the length of x within the update's row space, and the
first row of `V^T` is what Arrow calls the prototype. An adapter does not compete at a module that
it does not change, be it no target of its or its update zero.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from merge.factors import support
from router.adapters import Adapter
from router.clusters import Array
from router.merges import Routed
from router.passes import batches, forward
from router.predict import Answer, encode
from router.submission import Query


@dataclass(frozen=True)
class Experts:
    """The updates of the n adapters that compete at one module, side by side.

    Attributes:
        module: its name.
        a: (K, d_in) the rows `S_j v_j^T` of each adapter, K the sum of ranks.
        b: (d_out, K) the columns `u_j`.
        scales: (K,) float32, the singular values `S_j`, all above rounding.
        owners: (K,) int64, which of the n a row belongs to.
        arrows: (n, d_in) each one's first right singular vector.
        members: (n,) int64, which adapter of the library each is.
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


def load_experts(
    adapters: Sequence[Adapter], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, Experts]:
    """The updates of a library by module; decomposed in float64, kept in `dtype`."""
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor, Tensor, int]]] = {}
    for number, adapter in enumerate(adapters):
        for module, update in adapter.read_all():
            u, s, vh = support(update)
            if len(s):
                parts.setdefault(module, []).append((s[:, None] * vh, u, s, vh[:1], number))
    found = {}
    for module, experts in parts.items():
        a, b, scales, arrows, members = zip(*experts, strict=True)
        ranks = torch.tensor([len(rows) for rows in a])
        found[module] = Experts(
            module,
            torch.cat(a).to(device, dtype),
            torch.cat(b, dim=1).to(device, dtype),
            torch.cat(scales).to(device, torch.float32),
            torch.arange(len(a)).repeat_interleave(ranks).to(device),
            torch.cat(arrows).to(device, dtype),
            torch.tensor(members, device=device),
        )
    return found


def arrow_scores(experts: Experts, x: Tensor) -> Tensor:
    """`abs(v_1 . x)` of each adapter, (T, n) float32."""
    return (x @ experts.arrows.T).float().abs()


def norms(experts: Experts, along: Tensor) -> Tensor:
    """`norm(S V^T x)`, which is `norm(D x)`, of each adapter, (T, n) float32."""
    own = torch.nn.functional.one_hot(experts.owners, len(experts.members)).float()  # (K, n)
    return (along.float().square() @ own).sqrt()  # many times faster than index_add_


def input_norms(experts: Experts, along: Tensor) -> Tensor:
    """`norm(V^T x)` of each adapter, whatever its size, (T, n) float32."""
    return norms(experts, along.float() / experts.scales)


def keep_top(logits: Tensor, k: int) -> Tensor:
    """The logits with all but the k largest of each row at minus infinity."""
    best = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)


@contextmanager
def attached(model: Any, experts: Mapping[str, Experts], weigh: Rule) -> Iterator[None]:
    """Adds `sum_i w_i D_i x` to the output of each module while the block runs.

    The model's weights are not touched, and it is as before once the hooks are off.

    Args:
        model: the base model.
        experts: by module name.
        weigh: gives each token's weights; they need not sum to 1.
    """

    def add(expert: Experts) -> Callable[[Any, tuple[Tensor], Tensor], Tensor]:
        def hook(_: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
            x = args[0].flatten(0, -2)  # (T, d_in)
            along = x @ expert.a.T  # (T, K)
            weights = weigh(expert, x, along).to(along.dtype)  # (T, n)
            delta = (along * weights[:, expert.owners]) @ expert.b.T  # (T, d_out)
            return out + delta.view(out.shape)

        return hook

    handles = []
    try:
        for name, expert in experts.items():
            handles.append(model.get_submodule(name).register_forward_hook(add(expert)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def mean_weights(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, experts: Mapping[str, Experts], weigh: Rule,
    n_adapters: int,
) -> Array:  # fmt: skip
    """Each prompt's weights in one pass, averaged over its tokens and all modules.

    Args:
        rows: token ids of each prompt.
        n_adapters: in the library; an adapter has weight 0 where it does not compete.

    Returns:
        (prompts, adapters); rows sum to 1 if the weights do.
    """
    out = np.zeros((len(rows), n_adapters))
    with torch.inference_mode():
        for numbers, ids, mask in batches(model, rows, pad_id, "weights"):
            share = mask / (mask.sum(1, keepdim=True) * max(1, len(experts)))  # (B, T)
            tally = torch.zeros((len(numbers), n_adapters), device=ids.device)

            def noting(
                expert: Experts, x: Tensor, along: Tensor, share: Tensor = share, tally: Tensor = tally
            ) -> Tensor:
                weights = weigh(expert, x, along)  # (B * T, n)
                per_token = weights.view(*share.shape, -1)
                tally[:, expert.members] += torch.einsum("bt,btn->bn", share, per_token)
                return weights

            with attached(model, experts, noting):
                forward(model, ids, mask)
            out[numbers] = tally.cpu().numpy()
    return out


class PerToken(Routed):
    """A method that weighs the adapters anew for every token and module.

    There is no variant to write: one entry without a folder stands for all queries, with the mean
    weights, and --n_variants and --variant_rank change nothing. The routing table has each query's
    weights averaged over its prompt's tokens and all modules, from a pass of its own before the
    answers; the base model has no weight of its own, since its output is always there in full.

    Attributes, after `route`:
        experts: the library by module.
    """

    experts: dict[str, Experts]

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

    def route(self, queries: Sequence[Query]) -> Array:
        """Loads the library and gives the prompts' mean weights, for the routing table."""
        model, tokenizer = self.base.model, self.tokenizer
        with self.stages("experts"):
            self.experts = load_experts(self.adapters, str(model.device), model.dtype)
        with self.stages("weights"):
            rows = encode(tokenizer, [query.input for query in queries], self.settings.max_seq_len)
            means = mean_weights(
                model, rows, tokenizer.pad_token_id, self.experts, self.weigh, len(self.adapters)
            )
        return np.column_stack([means, np.full(len(means), 0.0 if self.experts else 1.0)])

    def folder(self, number: int) -> str | None:
        """None: nothing is merged."""
        return None

    def save_model(self, output_dir: str | Path) -> None:
        """Writes nothing: there is no merged adapter."""

    def _predict(self, queries: Sequence[Query], folder: Path) -> list[Answer]:
        with attached(self.base.model, self.experts, self.weigh), self._progress(queries) as bar:
            return self._answer_with(self.base.model, queries, bar.update)
