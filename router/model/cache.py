"""The key-value cache of a batch: filled part by part, with room for new tokens; rows can leave it.

transformers' own cache grows by concatenation, which copies all of it for every new token. This one grows by
many at once. Knows no adapters and no queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from router.model.device import tokens_at_once
from router.system.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def cache_argument(model: PreTrainedModel) -> str:
    """The model's argument for its key-value cache: transformers renamed it, and the old name warns."""
    plain: Any = getattr(model, "get_base_model", lambda: model)()
    return "cache" if "cache" in signature(plain.forward).parameters else "past_key_values"


STEP = 1024  # new tokens for which there is room at once


class _Roomy(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's keys and values with room for tokens to come, at most STEP at a time."""

    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self._all: tuple[Tensor, ...] = keys, values
        self._widen(min(room, STEP))
        self._show(keys.shape[-2])

    def _widen(self, room: int) -> None:
        self._all = tuple(torch.nn.functional.pad(x, (0, 0, 0, room)) for x in self._all)

    def _show(self, length: int) -> None:
        self.keys, self.values = (whole[:, :, :length] for whole in self._all)  # (B, heads, length, d)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._all[0].shape[-2]:
            self._widen(end - start + STEP)
        self._show(end)
        self.keys[:, :, start:], self.values[:, :, start:] = key_states, value_states
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.keys.shape[-2]
        self._all = tuple(whole[indices] for whole in self._all)
        self._show(length)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for the model.

    Raises:
        InputError: a layer of the model keeps something other than keys and values of its own.
    """
    cache = DynamicCache(config=model.config)
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise InputError(
            "--base_model: expected a model whose every layer has keys and values of its own, got one of the "
            f"kind {model.config.model_type}"
        )
    return cache


def keep_rows(cache: Any, rows: Tensor) -> None:
    """Leaves only these rows in a cache, whatever devices its layers are on; a row may be there twice."""
    for layer in cache.layers:
        layer.batch_select_indices(rows.to(layer.keys.device))


def read_prompts(model: PreTrainedModel, ids: Tensor, mask: Tensor, room: int) -> tuple[Tensor, DynamicCache]:
    """Reads a left-padded batch, with as many rows per pass as `tokens_at_once` allows.

    Args:
        model: a causal language model, plain or PEFT.
        ids, mask: (B, T).
        room: how many tokens will follow.

    Returns:
        Logits of the next token, (B, V), and the cache, which `cache_argument` says how to pass on.
    """
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    rows = max(1, tokens_at_once(ids.device, model.dtype) // ids.shape[1])
    logits, caches = [], []
    for start in range(0, len(ids), rows):
        part = slice(start, start + rows)
        cache = new_cache(model)
        out = model(
            input_ids=ids[part], attention_mask=mask[part], position_ids=positions[part], use_cache=True,
            logits_to_keep=1, **{cache_argument(model): cache},
        )  # fmt: skip
        logits.append(out.logits[:, -1])
        caches.append(cache)
    whole = caches[0]
    whole.layers = [_joined(layers, room) for layers in zip(*(c.layers for c in caches), strict=True)]
    return torch.cat(logits), whole


def read_token(model: PreTrainedModel, token: Tensor, mask: Tensor, cache: DynamicCache) -> Tensor:
    """Reads one more token of each row of a left-padded batch.

    Args:
        token: (B,) ids.
        mask: (B, T), of all tokens so far and of this one.
        cache: of those so far.

    Returns:
        Logits of the next token, (B, V).
    """
    logits: Tensor = model(
        input_ids=token[:, None], attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1,
        use_cache=True, **{cache_argument(model): cache},
    ).logits  # (B, 1, V)  # fmt: skip
    return logits[:, -1]


def _joined(layers: Sequence[DynamicLayer], room: int) -> DynamicLayer:
    """Joins the rows of one layer of several caches; a sliding-window layer forgets, so it keeps its kind."""
    first = layers[0]
    keys, values = (torch.cat(parts) for parts in zip(*((x.keys, x.values) for x in layers), strict=True))
    if type(first) is DynamicLayer:
        return _Roomy(keys, values, room)
    first.keys, first.values = keys, values
    return first
