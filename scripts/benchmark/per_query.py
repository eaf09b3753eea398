"""Every query answered with its own mix, nothing clustered: the ideal that variants approximate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from router.methods.proto_route import ProtoRoute
from router.per_token import Experts, attached, load_experts
from router.predict import BATCH_TOKENS, Answer, by_length, encode, pad_left
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
                part = [queries[n] for n in batch]
                multiple = part[0].eval_type == MULTIPLE_CHOICE
                found = self._answer_with(model, part) if multiple else self._write(part)
            answers.update(zip(batch, found, strict=True))
        return [answers[n] for n in range(len(queries))]

    def _write(self, queries: Sequence[Query]) -> list[Answer]:
        """As `router.predict.generate`, but by transformers, which keeps a batch whole."""
        rows = encode(self.tokenizer, [query.input for query in queries])
        ids, mask = pad_left(rows, self.tokenizer.pad_token_id, self.base.model.device)
        with torch.inference_mode():
            out = self.base.model.generate(
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

    def _batches(self, queries: Sequence[Query]) -> list[list[int]]:
        """Batches that stay whole and in order when they are answered, as the rows' weights must.

        Multiple choice comes one by one.
        """
        rows = encode(self.tokenizer, [query.input for query in queries])
        written = [n for n, query in enumerate(queries) if query.eval_type != MULTIPLE_CHOICE]
        lengths = [len(rows[n]) + self.settings.max_gen_len for n in written]
        batches = by_length(lengths, BATCH_TOKENS)
        alone = [[n] for n, query in enumerate(queries) if query.eval_type == MULTIPLE_CHOICE]
        return [[written[k] for k in batch] for batch in batches] + alone
