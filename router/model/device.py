"""A device's dtype, its memory, and how many tokens it gets at once.

All of it is asked of the device, and nothing is timed. So the same machine always makes the same batches,
whose rounding decides between answers that are nearly as likely.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.system.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Tokens in one pass over prompts. On most processors the activations of 512 stay in the caches, and more
# tokens are slower, not faster. One that multiplies tiles (AMX) is fastest at 2,048.
CPU_TOKENS, TILE_TOKENS, GPU_TOKENS = 512, 2048, 16384
BATCH_TOKENS = 4096  # in a batch that generates, including padding and new tokens
CHOICE_TOKENS = 2048  # in a batch of multiple choice; each choice counts with its prompt
ROOM = 0.7  # share of a device's memory that the base model, and a copy of its linear layers, may take
# Where Linux has the memory limit of a container, in bytes: control groups of version 2 and of version 1.
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
MOST = 16  # times as many tokens are in a batch on a GPU, if its memory allows


def pick_device(name: str) -> str:
    """`auto` becomes `cuda` if there is a CUDA device, else `cpu`.

    Raises:
        InputError: `cuda` was asked for and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is available here; use --device cpu or auto")
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return name


def pick_dtype(name: str, device: str) -> torch.dtype:
    """`auto` becomes bfloat16 if the device multiplies it natively, else float32 (float16 on a GPU)."""
    import torch

    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    native = any(_multiplies(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if native else torch.float32


def spread(model: PreTrainedModel) -> bool:
    """Whether accelerate has spread the model over several devices or memories, and moves what it needs."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 or "disk" in places


def _multiplies(kind: str) -> bool:
    """Whether the processor has an instruction; False where torch is too old to say."""
    import torch

    ask = getattr(torch.cpu, "get_capabilities", dict[str, bool])
    return bool(ask().get(kind))


def memory_bytes(device: torch.device) -> int:
    """All memory of a device: of a GPU its own, else what this process may have of the machine's."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    size = int(psutil.virtual_memory().total)
    for limit in LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it says `max`
            size = min(size, int(limit.read_text("utf-8")))
    return size


def keep_freed_memory() -> None:
    """Has this process keep the memory of freed tensors for the next ones, where the C library is glibc.

    It would hand large blocks back to the system and ask for them again, page by page, a fifth of the time of
    a pass. Elsewhere nothing happens.
    """
    import ctypes

    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    with suppress(OSError, AttributeError):  # another system, another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, 1 << 30)  # bytes
        libc.mallopt(trim_threshold, 1 << 30)


def tokens_at_once(device: torch.device, dtype: torch.dtype) -> int:
    """How many tokens, including padding, a forward pass over prompts should take."""
    import torch

    if device.type != "cpu":
        return GPU_TOKENS
    tiles = dtype == torch.bfloat16 and _multiplies("amx_bf16")
    return TILE_TOKENS if tiles else CPU_TOKENS


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """The bytes of the keys and values of one token in a model of this configuration."""
    text = config.get_text_config(decoder=True)
    layers = getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers
    widths = [
        (getattr(one, "num_key_value_heads", None) or one.num_attention_heads)
        * (getattr(one, "head_dim", None) or one.hidden_size // one.num_attention_heads)
        for one in layers
    ]
    return int(2 * sum(widths) * dtype.itemsize)


def batch_tokens(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """How many tokens a batch may hold that generates, and one of multiple choice, including padding.

    On a GPU they are as many as fit into half of what the weights and a copy of them leave of its memory:
    keys and values, for multiple choice also the logits, in the model's dtype and once in float32.
    """
    if device.type == "cpu":
        return BATCH_TOKENS, CHOICE_TOKENS
    weights = sum(weight.numel() for weight in model.parameters()) * dtype.itemsize
    room = (memory_bytes(device) - 2 * weights) // 2
    each = cache_bytes(model.config, dtype)
    chosen = each + model.config.get_text_config(decoder=True).vocab_size * (dtype.itemsize + 4)
    return _between(BATCH_TOKENS, room // each), _between(CHOICE_TOKENS, room // chosen)


def _between(least: int, wanted: int) -> int:
    return max(least, min(MOST * least, wanted))
