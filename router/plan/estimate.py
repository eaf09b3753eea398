"""Estimates what a run would take, before anything is loaded or downloaded: `router.main --plan`.

Adapters are read once for their hashes, with --skip_bad also for their values. Speed is measured, within a
minute, on a model with the base model's configuration and random weights; a large one gets few layers, and
the result is scaled to all. Two things cannot be known beforehand: the number of variants and the length of
the answers. They are taken from an earlier run with the same flags and adapters, if the output folder has
one. Else they are assumed: two variants more than adapters, and as many answers between 1 and 2 tokens as
between 16 and 32.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from merge.folders import WEIGHTS_FILE, AdapterFolder
from router.constants import COMPETITION_BASE
from router.errors import InputError, reason
from router.files import is_folder, read_json, replacing
from router.hub import HubError
from router.library.adapters import check_against_base, load_library
from router.library.sources import expand, is_here
from router.model.apply import picked
from router.model.base import (
    EMBEDDED,
    EMBEDDED_ID,
    embedded_folder,
    fetched,
    linear_shapes,
    weight_files,
)  # fmt: skip
from router.model.device import batch_tokens, cache_bytes, pick_device, pick_dtype, tokens_at_once
from router.pipeline import default_base
from router.plan.speed import Speed, measure, parameters, skeleton
from router.routing.calibration import generic_prompts
from router.routing.clusters import SAMPLE, most_variants
from router.routing.fitted import at_once
from router.settings import Settings
from router.submission import GENERATION, Query, read_queries, read_rows

PLAN = "plan.json"
RECORDED = ("seconds", "total_seconds", "peak_mib", "n_variants")  # of it, in run.json
PLANNED = ("proto_route", "base", "average")
LIBRARIES = 530 * 2**20  # bytes of torch, transformers, peft, faiss and the others, once in use
LEARNED = 20  # arrays of the gate, each as large as the responses to one prompt in float32
OBJECTS = 600  # bytes of Python's objects for each adapter's module
KERNELS = 200 * 2**20  # bytes of what torch compiles and keeps, and of activations, as seen on two cores


@dataclass(frozen=True)
class _Work:
    """What there is to do, in tokens.

    Attributes:
        prompts: of each query's prompt.
        truncated: of each distinct prompt after truncation, which is what routing reads.
        generic: of each generic prompt after truncation.
        written: of each generation query's prompt and the longest answer that is allowed.
        chosen: of all choices together.
        answers: of each answer of an earlier run, or of assumed answers.
        batch_size: as in Settings.
        probed: tokens in a pass of the probe.
        batch: tokens in a batch that generates, and in one of multiple choice, where batch_size is None.
    """

    prompts: list[int]
    truncated: list[int]
    generic: list[int]
    written: list[int]
    chosen: int
    answers: NDArray[np.float64]
    batch_size: int | None
    probed: int
    batch: tuple[int, int]


def plan(name: str, settings: Settings) -> dict[str, Any]:
    """What the run would take, as printed by `router.plan.text.lines` and kept in plan.json.

    Raises:
        InputError: the run itself would refuse its input, the base model's configuration is not here, or the
            method's cost is not known.
    """
    if name not in PLANNED:
        raise InputError(f"--plan: expected -m {', '.join(PLANNED)}, whose cost is known, got {name}")
    if settings.device_map:
        raise InputError("--plan: expected no --device_map, since the cost of moving weights is not known")
    queries = [query for path in settings.dataset_filepaths for query in read_queries(path)]
    specs = expand(settings.adapters)
    here = [spec for spec in specs if is_here(spec)]
    bad: list[str] | None = [] if settings.skip_bad else None
    library = load_library(here, local_only=True, bad=bad)
    spec = settings.base_model or default_base(settings, library)
    base = _base(spec)
    config, tokenizer = base.config, base.tokenizer
    model = skeleton(config)
    local = spec != EMBEDDED and is_folder(spec)
    library = check_against_base(library, base.name, local, linear_shapes(model), bad)
    adapters = {adapter.name: adapter.folder for adapter in library}
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    earlier = _earlier(name, settings, list(adapters))
    routed = name == "proto_route"
    most = most_variants(len(adapters) + 1)
    assumed = min(most, len(adapters) + 2) if routed else 1
    variants = settings.n_variants or earlier.get("n_variants") or assumed
    batch = batch_tokens(model, torch.device(device), dtype)
    probed = tokens_at_once(torch.device(device), dtype)
    work = _work(tokenizer, settings, queries, earlier, probed, batch)
    used = {} if name == "base" else adapters
    apply = picked(model, torch.device(device), dtype, settings.apply)
    speed = measure(config, parameters(model), device, dtype, apply, used, work.prompts)
    ways = {"likely": variants}
    if routed and not earlier and not settings.n_variants:
        ways |= {"low": max(1, variants // 2), "high": most}
    seconds = {way: _seconds(speed, work, adapters, count, routed) for way, count in ways.items()}
    if earlier and routed:
        for found in seconds.values():
            found["prototypes"] = found["calibrate"] = 0.0  # kept on disk since then
    changed = {module: shape for folder in used.values() for module, shape in folder.shapes.items()}
    copied = sum(map(math.prod, changed.values())) * dtype.itemsize if apply == "merged" else 0
    if settings.engine == "vllm":
        copied = parameters(model) * dtype.itemsize
    memory = _memory(base, dtype, parameters(model), copied, work, adapters, bool(routed))
    size = sum((folder.path / WEIGHTS_FILE).stat().st_size for folder in adapters.values())
    return {
        "method": name,
        "flags": settings.plain(),
        "base": base.name,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "queries": len(queries),
        "prompt_tokens": sum(work.prompts),
        "adapters": {
            own: {"rank": max(folder.ranks.values()), "modules": len(folder.ranks),
                  "mib": round((folder.path / WEIGHTS_FILE).stat().st_size / 2**20, 1)}
            for own, folder in adapters.items()
        },
        "download": {
            "adapters": [spec for spec in specs if spec not in here],
            "base": [] if base.file_bytes else [spec],
        },
        "n_variants": variants,
        "known_from_an_earlier_run": bool(earlier),
        "seconds": {stage: round(value, 1) for stage, value in seconds["likely"].items()},
        "total_seconds": [
            round(sum(seconds[way].values()), 1) for way in ("low", "likely", "high") if way in seconds
        ],
        "peak_mib": {stage: round(value) for stage, value in memory.items()},
        "disk_mib": round(variants * size / max(1, len(adapters)) * 1.5 / 2**20 + len(queries) / 1000),
    }  # fmt: skip


class _BaseModel(NamedTuple):
    config: Any
    tokenizer: Any  # None if it is not here
    name: str
    file_bytes: int  # of its weights, 0 if they are not here


def _cached(spec: str) -> Path | None:
    """The folder of a hub repository in the local cache, None if it is not there."""
    try:
        return fetched(spec, local_only=True)[0]
    except HubError:
        return None


def _base(spec: str) -> _BaseModel:
    """What can be known of the base model without its weights.

    Raises:
        InputError: its configuration is not here, or it is broken.
    """
    from transformers import AutoConfig, AutoTokenizer, MistralConfig

    if spec == EMBEDDED:
        folder: Path | None = embedded_folder()
    else:
        folder = Path(spec) if is_folder(spec) else _cached(spec)
    if folder:
        try:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            size = sum(file.stat().st_size for file in weight_files(folder))
        except Exception as error:  # transformers raises whatever a damaged configuration leads to
            raise InputError(
                f"--base_model {spec}: cannot be loaded from {folder}: {reason(error)}"
            ) from error
        return _BaseModel(config, tokenizer, EMBEDDED_ID if spec == EMBEDDED else spec, size)
    if spec.partition("@")[0] == COMPETITION_BASE:
        return _BaseModel(MistralConfig(), None, spec, 0)  # its defaults are this model's
    raise InputError(
        f"--plan: the base model {spec} is not here, so nothing is known of its size; fetch it first"
    )


def _encode(tokenizer: Any, texts: list[str], limit: int | None = None) -> list[list[int]]:
    if tokenizer is None:  # about four letters per token
        return [([0] * (1 + len(text) // 4))[:limit] for text in texts]
    from router.model.answer import encode

    return encode(tokenizer, texts, limit)


def _earlier(name: str, settings: Settings, adapters: list[str]) -> dict[str, Any]:
    """The record of an earlier run of the same method, flags and adapters, or nothing."""
    try:
        record: dict[str, Any] = read_json(settings.output_folder / "run.json", {})
        same = record["flags"] == settings.plain() and sorted(record["adapters"]) == sorted(adapters)
        made = record.get("n_variants", 1)
        same = same and isinstance(made, int) and made > 0
        return record if same and record["method"] == name else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _answer_lengths(tokenizer: Any, settings: Settings, queries: list[Query]) -> list[int]:
    """Tokens of each text that an earlier run wrote, including its end token; none if the texts are gone."""
    if tokenizer is None:
        return []
    kinds = [query.eval_type for query in queries]
    try:
        rows = [
            row["prediction"]
            for path in settings.dataset_filepaths
            for _, row in read_rows(settings.output_folder / path.name, ("prediction",))
        ]
    except InputError:
        return []
    if len(rows) != len(kinds):  # the queries have changed
        return []
    texts = [text for text, kind in zip(rows, kinds, strict=True) if kind == GENERATION]
    return [min(settings.max_gen_len, 1 + len(ids)) for ids in _encode(tokenizer, texts)]


def _work(
    tokenizer: Any, settings: Settings, queries: list[Query], earlier: dict[str, Any], probed: int,
    batch: tuple[int, int],
) -> _Work:  # fmt: skip
    from router.model.passes import truncated

    limit, longest = settings.max_seq_len, settings.max_gen_len
    prompts = _encode(tokenizer, [query.input for query in queries], limit)
    distinct = {query.input: ids for query, ids in zip(queries, prompts, strict=True)}
    lengths = _answer_lengths(tokenizer, settings, queries) if earlier else []
    choices = [choice for query in queries for choice in query.choices]
    return _Work(
        prompts=[len(ids) for ids in prompts],
        truncated=[len(ids) for ids in truncated(list(distinct.values()))],
        generic=[len(ids) for ids in truncated(_encode(tokenizer, generic_prompts(), limit))],
        written=[
            len(ids) + longest
            for ids, query in zip(prompts, queries, strict=True)
            if query.eval_type == GENERATION
        ],
        chosen=sum(map(len, _encode(tokenizer, choices))) if choices else 0,
        answers=np.array(lengths or np.geomspace(1, longest, 64)),
        batch_size=settings.batch_size,
        probed=probed,
        batch=batch,
    )


def _seconds(
    speed: Speed, work: _Work, adapters: dict[str, AdapterFolder], variants: int, routed: bool
) -> dict[str, float]:
    """Seconds by stage, with nothing calibrated yet."""
    found = {"load": 4.0}
    if routed:
        found["prototypes"] = speed.prototypes * len(adapters)
        found["calibrate"] = sum(work.generic) * (speed.read + speed.probe)
        found["probe"] = sum(work.truncated) * speed.probe
    found["variants"] = variants * speed.swap / 2
    found["predict"] = sum(work.prompts) * speed.read_active + work.chosen * speed.write_row
    found["predict"] += variants * speed.swap / 2
    if work.written:
        # Assume that a variant's last batch is half full, or its only one is as large as the variant.
        size = work.batch_size
        full = len(work.written) / size if size else sum(work.written) / work.batch[0]
        batches = max(variants, variants / 2 + full)
        rows = len(work.written) / batches
        steps = float(np.quantile(work.answers, rows / (rows + 1)))  # a batch writes until its longest ends
        each = float(work.answers.mean()) * speed.write_row
        found["predict"] += batches * steps * speed.write + len(work.written) * each
    return found


def _memory(
    base: _BaseModel,
    dtype: torch.dtype,
    n_parameters: int,
    copied: int,
    work: _Work,
    adapters: dict[str, AdapterFolder],
    routed: bool,
) -> dict[str, float]:
    """Peak resident memory by stage, MiB, on a CPU.

    Args:
        dtype: of the base model.
        copied: bytes of the copy of the weights that variants are added to, or that vLLM loads.
        routed: whether there is a probe.
    """
    config, size = base.config, dtype.itemsize
    weights = n_parameters * size
    tokens = work.batch_size * max(work.written, default=0) if work.batch_size else work.batch[0]
    cache = cache_bytes(config, dtype) * tokens if work.written else 0
    logits = work.batch[1] * config.get_text_config(decoder=True).vocab_size * size if work.chosen else 0
    # The file stays mapped while the weights are made from it.
    found = {"load": LIBRARIES + (base.file_bytes or weights) + weights}
    held = LIBRARIES + weights
    if routed:
        own = sum(
            rank * folder.shapes[m][1] for folder in adapters.values() for m, rank in folder.ranks.items()
        )
        modules = len({module for folder in adapters.values() for module in folder.ranks})
        many, queries = len(adapters), len(work.truncated)
        each = 4 * modules * many * 2  # of a prompt, float32, in two views
        reference = len(generic_prompts()) * each
        columns: Counter[str] = Counter()  # of all prototypes, by module
        for folder in adapters.values():
            columns.update(folder.ranks)
        products = 12 * max(columns.values(), default=0) * work.probed  # three arrays of a batch's tokens
        products += at_once(many, modules) * each  # the responses of a batch are added up apart
        evidence = (4 * (modules + 2 * many) + 8 * many) * queries  # and the weights
        held += own * size + LEARNED * each + OBJECTS * sum(len(folder.ranks) for folder in adapters.values())
        # Calibration holds the responses to generic text and a copy of them, or of some; then come the
        # queries, some at a time, and the evidence of all is joined; then mixes are compared.
        extra = (
            2 * reference + products,
            at_once(many, modules) * each + products + 2 * evidence,
            evidence + 4 * 8 * many * min(queries, SAMPLE),
        )
        found["probe"] = max(found["load"], held + max(extra) + KERNELS)
        held += evidence
    held += copied
    found["predict"] = max(found["load"], held + KERNELS + 2 * cache, held + KERNELS + logits)
    return {stage: value / 2**20 for stage, value in found.items()}


def keep(found: dict[str, Any], folder: Path) -> None:
    """Writes plan.json; a run with the same flags records it beside what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PLAN) as file:
        json.dump(found, file, indent=2)


def kept(folder: Path, name: str, flags: dict[str, Any]) -> dict[str, Any] | None:
    """What plan.json says about a method with these flags; None if it is missing or about another run."""
    try:
        found: dict[str, Any] = read_json(folder / PLAN, dict.fromkeys(RECORDED, object))
        return found if found["method"] == name and found["flags"] == flags else None
    except (OSError, ValueError, KeyError):
        return None
