"""What is asked of a device: its dtype, and batches that grow with its memory alone."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CONFIG_MAPPING, MistralConfig

from helpers import family
from router.model import device
from router.model.device import batch_tokens, cache_bytes, pick_dtype

GIB = 2**30
CPU = torch.device("cpu")


@pytest.mark.parametrize(("real", "expected"), [(False, torch.float16), (True, torch.bfloat16)])
def test_bfloat16_that_a_gpu_emulates_is_not_taken(monkeypatch, real, expected):
    """As torch answers on a T4 or V100."""
    supported = "torch.cuda.is_bf16_supported"
    monkeypatch.setattr(supported, lambda including_emulation=True: including_emulation or real)
    assert pick_dtype("auto", "cuda") is expected


def test_batches_grow_with_the_memory_of_a_gpu_alone(monkeypatch):
    weights = SimpleNamespace(numel=lambda: 7_241_732_096)
    mistral = SimpleNamespace(config=MistralConfig(), parameters=lambda: [weights])
    found, cpu = [], set()
    for size in (16, 40, 48, 80, 1000):
        monkeypatch.setattr(device, "memory_bytes", lambda place, size=size: size * GIB)
        found.append(batch_tokens(mistral, torch.device("cuda"), torch.bfloat16))
        cpu.add(batch_tokens(mistral, CPU, torch.bfloat16))
    assert cpu == {found[0]} and found == sorted(found) and len(set(found)) > 2


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma4_text"])
def test_the_cache_of_a_token_is_counted_layer_by_layer(kind):
    """Gemma 4's layers have heads of different width."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers has no {kind} yet")
    model = family(kind, 64)
    cache = model(torch.ones(1, 4, dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 4 * cache_bytes(model.config, torch.float32) == held


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
