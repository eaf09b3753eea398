"""One pass of a model over prompts, for routers that read a query before it is answered.

Knows no adapters and no labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from router.model.answer import by_length, pad_left
from router.model.device import tokens_at_once
from router.progress import progress

MAX_TOKENS = 128  # the most that routing reads of a prompt; docs/speed.md tells what more would change


def truncated(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Truncates prompts for routing: keeps all of a short one, the first and the last tokens of a long one.

    A prompt asks its question at one of its ends. What lies between is context.

    Example:
        >>> [ids] = truncated([list(range(1000))])
        >>> len(ids), ids[0], ids[63], ids[64], ids[-1]
        (128, 0, 63, 936, 999)
    """
    return [
        [*row[: MAX_TOKENS // 2], *row[-(MAX_TOKENS // 2) :]] if len(row) > MAX_TOKENS else list(row)
        for row in rows
    ]


def batches(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, title: str | None, budget: int | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yields (row numbers, ids, mask) of left-padded batches, ids and mask (B, T); a title shows a bar.

    A batch has at most `budget` tokens, including padding; None: as many as a pass should take.
    """
    lengths = [len(row) for row in rows]
    with progress(total=sum(lengths), desc=title, unit="tok") if title else nullcontext() as bar:
        for batch in by_length(lengths, budget or tokens_at_once(model.device, model.dtype)):
            yield batch, *pad_left([rows[n] for n in batch], pad_id, model.device)
            if bar is not None:
                bar.update(sum(lengths[n] for n in batch))


def forward(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Runs the model on a left-padded batch, so that hooks can read it; returns the next logits, (B, V)."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits: Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
    ).logits  # (B, 1, V)
    return logits[:, -1]
