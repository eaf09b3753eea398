"""One pass of a model over prompts, for routers that read a query before it is answered.

Knows no adapters and no labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from threading import RLock
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from router.model.answer import Rows, by_length, fitting, padded, positions, vocabulary
from router.model.device import tokens_at_once
from router.system.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Found = TypeVar("Found")

MAX_TOKENS = 128  # the most that routing reads of a prompt; docs/lab.md tells what more would change
HEAD = 32  # of these before a long message, such as a system message's; a short one leaves it more
ENDS = 1 << 14  # characters at either end of a text, which hold more tokens than routing reads of it

_LOCKS: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()


def lock_of(model: PreTrainedModel) -> RLock:
    """The lock that a thread holds while it has hooks on a model."""
    return _LOCKS.setdefault(model, RLock())


def truncated(rows: Rows) -> list[list[int]]:
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


def headed(row: Sequence[int], head: int, frame: bool = False) -> list[int]:
    """Shortens a long head to its two ends, so that `truncated` keeps the message.

    Args:
        head: how many of the tokens come before the message.
        frame: whether these say nothing. Then as many are read of the head before any message, at most half.

    Example:
        >>> [ids] = truncated([headed(list(range(1000)), 500)])
        >>> ids[15], ids[16], ids[31], ids[32], ids[63], ids[64]
        (15, 484, 499, 500, 531, 936)
    """
    room = MAX_TOKENS // 2 if frame else max(HEAD, MAX_TOKENS - len(row[head:]))
    return list(row) if head <= room else [*row[: room // 2], *row[head - (room - room // 2) :]]


def ends_of(text: str, most: int) -> str:
    """A text, or its first and last `most` characters."""
    return text if len(text) <= 2 * most else text[:most] + text[-most:]


@torch.inference_mode()
def batches(
    model: PreTrainedModel,
    rows: Rows,
    pad_id: int,
    title: str | None,
    read: Callable[[Tensor, Tensor], Found],
) -> Iterator[tuple[list[int], Found]]:
    """Yields (row numbers, what was read) of left-padded batches; a title shows a bar.

    A batch that does not fit into memory is read in halves, and so are all batches after it. Of a prompt that
    is longer than the model's `positions`, which has no answer, the start is read. Tokens that the model does
    not know are read as padding tokens.

    Args:
        read: called with ids and mask of a batch, both (B, T); what it returns is not None.

    Raises:
        Exception: whatever `read` raises; for want of memory only if a single prompt does not fit.
    """
    most, known = positions(model), vocabulary(model)
    rows = [[token if token < known else pad_id for token in row[:most]] for row in rows]
    lengths = [len(row) for row in rows]

    def read_rows(batch: list[int]) -> Found:
        with lock_of(model):  # batch by batch, so that others get their turn
            return read(*padded([rows[n] for n in batch], pad_id, model.device))

    grouped = by_length(lengths, tokens_at_once(model.device, model.dtype))
    with progress(total=sum(lengths), desc=title, unit="tok") if title else nullcontext() as bar:
        for batch, result in fitting(grouped, read_rows):
            yield batch, read_rows(batch) if result is None else result  # again, for its error
            if bar is not None:
                bar.update(sum(lengths[n] for n in batch))


def forward(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Runs the model on a left-padded batch, so that hooks can read it; returns the next logits, (B, V)."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits: Tensor = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
    ).logits  # (B, 1, V)
    return logits[:, -1]
