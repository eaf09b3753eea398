"""One pass of a model over prompts, for routers that look at a query before it is answered.

Knows no adapters beyond which modules they change, and no labels.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from torch import Tensor

from router.adapters import Adapter
from router.cache import tokens_at_once
from router.predict import by_length, pad_left
from router.progress import progress

LOOK = 128  # tokens of a prompt that routing reads at most; docs/speed.md tells what more would change


def look(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """What routing reads of each prompt: all of a short one, the first and the last tokens of a long one.

    What is asked stands at an end; what is between, a context, would be read for each adapter in question.
    """
    return [[*row[: LOOK // 2], *row[-(LOOK // 2) :]] if len(row) > LOOK else list(row) for row in rows]


def batches(
    model: Any, rows: Sequence[Sequence[int]], pad_id: int, title: str | None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(row numbers, ids, mask) of each left-padded batch, ids and mask (B, T); no title, no progress bar."""
    lengths = [len(row) for row in rows]
    with progress(total=sum(lengths), desc=title, unit="tok") if title else nullcontext() as bar:
        for batch in by_length(lengths, tokens_at_once(model.device)):
            yield batch, *pad_left([rows[n] for n in batch], pad_id, model.device)
            if bar is not None:
                bar.update(sum(lengths[n] for n in batch))


class Last(NamedTuple):
    """Where a model stands at the last token of each prompt, before it answers."""

    hidden: Tensor  # (B, d) what the output layer reads there
    confidence: Tensor  # (B,) float32, log-probability in nats of the likeliest next token


def forward(model: Any, ids: Tensor, mask: Tensor) -> Last:
    """Runs the model on a left-padded batch, for what hooks see on the way and where it ends."""
    seen: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    try:
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1
        ).logits  # (B, 1, V)
    finally:
        handle.remove()
    return Last(seen[-1][:, -1], logits[:, -1].float().log_softmax(-1).amax(-1))


def last_block(adapters: Sequence[Adapter]) -> list[str]:
    """The modules that adapters change in one block: of the blocks that most of them change, the last."""
    blocks: dict[str, list[set[str]]] = {}
    for adapter in adapters:
        mine: dict[str, set[str]] = {}
        for module in adapter.folder.shapes:
            mine.setdefault(_block(module), set()).add(module)
        for block, modules in mine.items():
            blocks.setdefault(block, []).append(modules)
    best = max(blocks, key=lambda block: (len(blocks[block]), _number(block)))
    return sorted(set.union(*blocks[best]))


def _block(module: str) -> str:
    """`model.layers.3.self_attn.q_proj` is in `model.layers.3`; a module outside of blocks is its own."""
    found = re.match(r"(.*?\.\d+)\.", module)
    return found[1] if found else module


def _number(block: str) -> int:
    found = re.search(r"\.(\d+)$", block)
    return int(found[1]) if found else -1
