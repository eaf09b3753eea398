"""Fixtures: a tiny random model with its tokenizer, tiny adapters for it, and the kit's golden files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        skip = pytest.mark.skip(reason="slow; run with --all")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


def shared(name, what):
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{what} are not on this machine")
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is kept between runs goes to a temporary folder; the converted model stays in the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("router.disk.cache_folder", lambda: folder)
        yield


@pytest.fixture(scope="session")
def kit_golden():
    return shared("kit_golden", "the starter kit's golden files")


@pytest.fixture(scope="session")
def competition():
    return shared("competition", "the competition's CSV files")


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory):
    """A folder with a random two-layer Llama (hidden 32) and a byte-level tokenizer without BOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: n for n, letter in enumerate(alphabet, 2)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=1, pad_token_id=0,
        initializer_range=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


WIDTHS = {
    "self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32), "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}  # fmt: skip


def write_tiny_adapter(
    folder, seed, rank=4, kinds=tuple(WIDTHS), alpha=None, size=0.3, layers=(0, 1), **config
):
    """A random adapter for tiny_base as a PEFT folder, written without the code under test."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for kind in kinds:
            d_out, d_in = WIDTHS[kind]
            prefix = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) * size
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(d_out, rank, generator=generator) * size
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny", "r": rank,
        "lora_alpha": rank if alpha is None else alpha, "lora_dropout": 0.0, "bias": "none",
        "target_modules": sorted(kind.rsplit(".", 1)[-1] for kind in kinds),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    return folder


@pytest.fixture()
def tiny_library(tmp_path):
    """Three adapters of different ranks and targets, one of them rsLoRA."""
    write_tiny_adapter(tmp_path / "library" / "attention", 1, 4, tuple(WIDTHS)[:4], alpha=8)
    write_tiny_adapter(tmp_path / "library" / "everything", 2, 2, alpha=2)
    write_tiny_adapter(tmp_path / "library" / "mlp", 3, 6, tuple(WIDTHS)[4:], alpha=9, use_rslora=True)
    return tmp_path / "library"


@pytest.fixture(scope="module")
def base(tiny_base):
    from router.base import load_base

    return load_base(str(tiny_base), "cpu", "float32")


@pytest.fixture()
def adapters(tiny_library):
    from router.adapters import load_library

    return load_library([str(tiny_library)])
