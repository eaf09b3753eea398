"""The graded metric: how likely the reference answer is under what a method would answer with.

Shares of right answers cannot tell methods apart where nothing is right. The mean log-probability of the
reference's tokens can, in one pass and without writing. It is the method's own: the same variants, mixes and
hooks as in its answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from router.model.answer import Answer, by_length, pad_left
from router.model.device import CHOICE_TOKENS
from router.pipeline import Routed
from router.result import Decision
from router.submission import MULTIPLE_CHOICE, Query


def log_likelihoods(
    model: Any, tokenizer: Any, rows: Sequence[Sequence[int]], texts: Sequence[str]
) -> list[float]:
    """The mean log-probability per token, in nats, of a text after each prompt.

    A text may follow with or without a blank, which an answer is stripped of; the likelier one counts.

    Args:
        rows: token ids of each prompt.
        texts: an empty one has no likelihood, NaN.
    """
    forms: list[list[int]] = tokenizer([f"{blank}{t}" for t in texts for blank in ("", " ")],
                                       add_special_tokens=False)["input_ids"]  # fmt: skip
    prompts = [rows[n // 2] for n in range(len(forms))]
    found = [
        sum(logs) / max(1, len(logs))
        for logs in log_probabilities(model, prompts, forms, tokenizer.pad_token_id)
    ]
    best = map(max, found[::2], found[1::2])
    return [value if text else math.nan for value, text in zip(best, texts, strict=True)]


def log_probabilities(
    model: Any, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]], pad_id: int
) -> list[list[float]]:
    """The log-probability, in nats, of each token of a tail after its prompt; both are token ids."""
    both = [[*prompt, *tail] for prompt, tail in zip(prompts, tails, strict=True)]
    found: list[list[float]] = [[]] * len(both)
    for batch in by_length([len(row) for row in both], CHOICE_TOKENS):
        ids, mask = pad_left([both[n] for n in batch], pad_id, model.device)
        widest = max(1, *(len(tails[n]) for n in batch))
        with torch.inference_mode():
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp_min(0),
                use_cache=False,
                logits_to_keep=widest + 1,
            ).logits[:, :-1]  # (B, widest, V)
        for n, one, tokens in zip(batch, logits, ids[:, -widest:], strict=True):
            if size := len(tails[n]):
                logs = one[-size:].float().log_softmax(-1).gather(1, tokens[-size:, None])  # (size, 1)
                found[n] = logs.flatten().tolist()
    return found


@contextmanager
def grading(method: Routed) -> Iterator[None]:
    """Inside the block the method answers nothing: it grades the one choice of each query."""

    def graded(
        model: Any, part: Sequence[Query], ids: Sequence[Sequence[int]], progress: object = None
    ) -> list[Answer]:
        texts = [query.choices[0] for query in part]
        found = log_likelihoods(model, method.tokenizer, ids, texts)
        return [Answer("", scores=(value,)) for value in found]

    vars(method)["answer_with"] = graded  # in place of the class's
    try:
        yield
    finally:
        del vars(method)["answer_with"]


def with_references(queries: Sequence[Query], references: Sequence[str]) -> list[Query]:
    """The queries, each with its reference as its one choice."""
    return [
        replace(query, eval_type=MULTIPLE_CHOICE, choices=(reference,))
        for query, reference in zip(queries, references, strict=True)
    ]


def of_references(
    method: Routed,
    queries: Sequence[Query],
    rows: Sequence[Sequence[int]],
    references: Sequence[str],
    decision: Decision,
    folder: Path,
) -> list[float]:
    """The references' mean log-probabilities per token, each under what its query is answered with.

    Args:
        decision: how the method routed the queries.
        folder: holds the variants' folders.
    """
    with grading(method):
        found = method.predict(with_references(queries, references), rows, decision, folder)
    return [answer.scores[0] for answer in found]
