"""Every query answered with its own mix, nothing clustered: the ideal that variants approximate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from router.methods.proto_route import ProtoRoute
from router.model.answer import Answer, by_length, pad_left
from router.model.device import BATCH_TOKENS
from router.per_token import Experts, attached, load_experts
from router.result import Decision
from router.routing.clusters import mixes
from router.routing.variants import Variant
from router.submission import MULTIPLE_CHOICE, Query


class PerQuery(ProtoRoute):
    """proto_route's weights, each query's mix made for it alone by hooks."""

    @property
    def n_variants(self) -> int:
        """One entry for all queries: nothing is merged."""
        return 1

    def write_variants(self, variants: Sequence[Variant], folder: Path) -> list[str | None]:
        """Writes nothing."""
        return [None] * len(variants)

    def predict(
        self,
        queries: Sequence[Query],
        rows: Sequence[Sequence[int]],
        decision: Decision,
        folder: Path,
    ) -> list[Answer]:
        """Answers each query with the base model, to whose outputs the query's own mix is added."""
        model = self.base.model
        experts = load_experts(self.adapters, str(model.device), model.dtype)
        answers: dict[int, Answer] = {}
        own = mixes(decision.routing.weights)  # (queries, adapters + 1)
        for batch in self._batches(queries, rows):
            mine = torch.tensor(own[batch, :-1], device=model.device)  # (B, adapters)

            def mix(expert: Experts, x: Tensor, along: Tensor, mine: Tensor = mine) -> Tensor:
                weights = mine[:, expert.members]  # (B, n)
                return weights.repeat_interleave(len(x) // len(weights), 0).float()  # (B * T, n)

            part, ids = [queries[n] for n in batch], [rows[n] for n in batch]
            with attached(model, experts, mix):
                multiple = part[0].eval_type == MULTIPLE_CHOICE
                found = self.answer_with(model, part, ids) if multiple else self._write(ids)
            answers.update(zip(batch, found, strict=True))
        return [answers[n] for n in range(len(queries))]

    def _write(self, rows: Sequence[Sequence[int]]) -> list[Answer]:
        """As `router.model.answer.generate`, but by transformers, which keeps a batch whole."""
        model: Any = self.base.model
        ids, mask = pad_left(rows, self.tokenizer.pad_token_id, model.device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.settings.max_gen_len,
                do_sample=False,
                num_beams=1,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )  # (B, T + new)
        texts = self.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return [Answer(text.strip()) for text in texts]

    def _batches(self, queries: Sequence[Query], rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
        """Batches that stay whole and in order when they are answered, as the rows' weights must.

        Multiple choice comes one by one.
        """
        written = [n for n, query in enumerate(queries) if query.eval_type != MULTIPLE_CHOICE]
        lengths = [len(rows[n]) + self.settings.max_gen_len for n in written]
        for batch in by_length(lengths, BATCH_TOKENS):
            yield [written[k] for k in batch]
        for n, query in enumerate(queries):
            if query.eval_type == MULTIPLE_CHOICE:
                yield [n]
