"""What is asked of a device: its dtype, and batches that grow with its memory alone."""

from types import SimpleNamespace

import pytest
import torch
from transformers import MistralConfig

from router.model import device
from router.model.device import batch_tokens, pick_dtype, tokens_at_once

GIB = 2**30
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_a_processor_that_multiplies_tiles_reads_more_at_once(monkeypatch):
    """And bfloat16 that a GPU emulates is not taken, as torch answers on a T4 or V100."""
    for tiles, expected in ((True, 2048), (False, 512)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda tiles=tiles: {"amx_bf16": tiles}, False)
        assert tokens_at_once(CPU, torch.bfloat16) == expected
    assert tokens_at_once(CPU, torch.float32) == 512 and tokens_at_once(CUDA, torch.float32) == 16384
    for real, expected in ((False, torch.float16), (True, torch.bfloat16)):
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, real=real: including_emulation or real,
        )
        assert pick_dtype("auto", "cuda") is expected


def mistral():
    """Mistral-7B's configuration and size, without its weights."""
    weights = SimpleNamespace(numel=lambda: 7_241_732_096)
    return SimpleNamespace(config=MistralConfig(), parameters=lambda: [weights])


def test_batches_grow_with_the_memory_of_a_gpu_alone(monkeypatch):
    found = []
    for size in (16, 40, 48, 80, 1000):
        monkeypatch.setattr(device, "memory_bytes", lambda place, size=size: size * GIB)
        found.append(batch_tokens(mistral(), CUDA, torch.bfloat16))
        assert batch_tokens(mistral(), CPU, torch.bfloat16) == (4096, 2048)
    assert found[0] == (4096, 2048) and found[-1] == (65536, 32768)  # the least, and 16 times that
    assert found == sorted(found) and len(set(found)) > 2


@pytest.mark.parametrize("version", [0, 1])
def test_the_limit_of_a_container_counts(version, tmp_path, monkeypatch):
    whole = device.memory_bytes(CPU)
    limits = [tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"]
    monkeypatch.setattr(device, "LIMITS", limits)
    for text, expected in ((str(GIB), GIB), ("max", None), (str((1 << 63) - 4096), None)):
        limits[version].write_text(text)
        assert device.memory_bytes(CPU) == expected or (
            expected is None and device.memory_bytes(CPU) >= whole
        )
