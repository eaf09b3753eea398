"""Every query answered with its own mix, nothing clustered: the ideal that variants approximate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from router.methods.proto_route import ProtoRoute
from router.per_token import Experts, attached, load_experts
from router.predict import BATCH_TOKENS, Answer, by_length, encode
from router.submission import MULTIPLE_CHOICE, Query


class PerQuery(ProtoRoute):
    """proto_route's weights, each query's mix made for it alone by hooks."""

    @property
    def n_variants(self) -> int:
        """One entry for all queries: nothing is merged."""
        return 1

    def folder(self, number: int) -> str | None:
        """None: nothing is written."""
        return None

    def _predict(self, queries: Sequence[Query], folder: Path) -> list[Answer]:
        model = self.base.model
        experts = load_experts(self.adapters, str(model.device), model.dtype)
        answers: dict[int, Answer] = {}
        for batch in self._batches(queries):
            weights = torch.tensor(self.weights[batch, :-1], device=model.device)  # (B, adapters)

            def mix(expert: Experts, x: Tensor, along: Tensor, weights: Tensor = weights) -> Tensor:
                mine = weights[:, expert.members]  # (B, n)
                return mine.repeat_interleave(len(x) // len(mine), 0).float()  # (B * T, n)

            with attached(model, experts, mix):
                found = self._answer_with(model, [queries[n] for n in batch])
            answers.update(zip(batch, found, strict=True))
        return [answers[n] for n in range(len(queries))]

    def _batches(self, queries: Sequence[Query]) -> list[list[int]]:
        """Batches that stay whole and in order when they are answered, as the rows' weights must.

        Rows of generation are sorted by length, as they will be; multiple choice comes one by one.
        """
        rows = encode(self.tokenizer, [query.input for query in queries])
        written = [n for n, query in enumerate(queries) if query.eval_type != MULTIPLE_CHOICE]
        lengths = [len(rows[n]) + self.settings.max_gen_len for n in written]
        batches = by_length(lengths, BATCH_TOKENS)
        alone = [[n] for n, query in enumerate(queries) if query.eval_type == MULTIPLE_CHOICE]
        return [[written[k] for k in batch] for batch in batches] + alone
