"""What candidates would write after a prompt: evidence that the gate does without, for docs/ablations.md.

Each candidate writes a few tokens. What it writes may fit the prompt or not, and the base model can tell: it
finds them likelier after this prompt than after others (pointwise mutual information, Holtzman et al. 2021,
"Surface Form Competition"). It takes a pass with each candidate, so the package itself does not ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from router.library.adapters import Adapter
from router.model.answer import by_length, generate, pad_id
from router.model.apply import applied
from router.model.base import Base
from router.model.device import CHOICE_TOKENS
from scripts.bench.quality.likelihood import log_probabilities

Pair = tuple[int, int]  # numbers of a prompt and of an adapter
Rows = Sequence[Sequence[int]]
TOKENS = 8


class Tried(NamedTuple):
    """Log-probabilities, in nats, of what an adapter writes after a prompt."""

    own: float  # under the adapter
    base: float  # under the base model
    elsewhere: float  # under the base model after other prompts, the mean


def tried(
    base: Base, adapters: Sequence[Adapter], rows: Rows, others: Rows, pairs: Sequence[Pair]
) -> dict[Pair, Tried]:
    """Has each pair's adapter write after its prompt.

    Args:
        rows: token ids of each prompt.
        others: token ids of prompts that have nothing to do with these.
    """
    pad = pad_id(base.tokenizer)
    texts: dict[Pair, tuple[int, ...]] = {}
    own: dict[Pair, float] = {}
    with applied(base) as models:
        for number in sorted({adapter for _, adapter in pairs}):
            mine = [pair for pair in pairs if pair[1] == number]
            model, prompts = models.activate(adapters[number].folder.path), [rows[q] for q, _ in mine]
            for batch in by_length([len(row) + TOKENS for row in prompts], CHOICE_TOKENS):
                part = generate(model, base.tokenizer, [prompts[n] for n in batch], TOKENS)
                texts |= {mine[n]: answer.ids for n, answer in zip(batch, part, strict=True)}
            own |= _sums(mine, log_probabilities(model, prompts, [texts[pair] for pair in mine], pad))
        model, written = models.activate(None), [texts[pair] for pair in pairs]
        after = _sums(pairs, log_probabilities(model, [rows[q] for q, _ in pairs], written, pad))
        beside = [_sums(pairs, log_probabilities(model, [row] * len(pairs), written, pad)) for row in others]
    return {
        pair: Tried(own[pair], after[pair], float(np.mean([sums[pair] for sums in beside]))) for pair in pairs
    }


def _sums(pairs: Sequence[Pair], logs: Sequence[Sequence[float]]) -> dict[Pair, float]:
    return {pair: float(sum(values)) for pair, values in zip(pairs, logs, strict=True)}
