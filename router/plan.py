"""What a run would take, before anything of it is loaded or downloaded: `router.main --plan`.

Adapters are looked at by their headers. Speed is measured, within a minute, on a model of the base model's
configuration with random weights, and where that is large with few layers and scaled to all. What cannot be
known before, how many variants there will be and how long the answers, is taken from an earlier run in the
output folder where there is one of the same queries and adapters. Else it is assumed: two variants more
than adapters, and as many answers between 1 and 2 tokens as between 16 and 32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merge.folders import WEIGHTS_FILE, AdapterFolder
from router.adapters import check_against_base, load_library
from router.base import (
    EMBEDDED,
    EMBEDDED_ID,
    embedded_folder,
    linear_shapes,
    pick_device,
    pick_dtype,
    weight_files,
)  # fmt: skip
from router.clusters import MAX_VARIANTS
from router.constants import COMPETITION, COMPETITION_ADAPTERS, COMPETITION_BASE, LIBRARY
from router.errors import InputError
from router.merges import default_base
from router.settings import Settings
from router.speed import Speed, measure, parameters, skeleton
from router.submission import GENERATION, Query, read_queries, read_rows, replacing

PLAN = "plan.json"
PLANNED = ("proto_route", "base", "average")
LIBRARIES = 530 * 2**20  # bytes: torch, transformers, peft, faiss and the others, once they have worked
KERNELS = 200 * 2**20  # that torch compiles for shapes and keeps, and activations: as seen on two cores
TRIED = 2.0  # adapters in question for a query: 1.5 to 2.4 were seen with the committed library


@dataclass(frozen=True)
class _Work:
    """What there is to do, in tokens.

    Attributes:
        prompts: of each query.
        looked: of each distinct prompt, what routing reads.
        generic: of each generic prompt.
        written: of each query that is answered in writing, with the longest answer that is allowed.
        chosen: of all choices.
        answers: of answers, or of a guess at them.
        tried: adapters in question for a query, on average.
        batch_size: as in Settings.
    """

    prompts: list[int]
    looked: list[int]
    generic: list[int]
    written: list[int]
    chosen: int
    answers: NDArray[np.float64]
    tried: float
    batch_size: int | None


def plan(name: str, settings: Settings) -> dict[str, Any]:
    """What the run would take, as printed by `lines` and kept in plan.json.

    Raises:
        InputError: what the run would refuse too, a base model that is not at hand, or a method whose cost is
            not known.
    """
    if name not in PLANNED:
        raise InputError(f"--plan: expected -m {', '.join(PLANNED)}, whose cost is known, got {name}")
    queries = [query for path in settings.dataset_filepaths for query in read_queries(path)]
    specs = COMPETITION_ADAPTERS if settings.adapters == (COMPETITION,) else settings.adapters
    here = [spec for spec in specs if _is_here(spec)]
    library = load_library(here, local_only=True)
    adapters = {adapter.name: adapter.folder for adapter in library}
    spec = settings.base_model or default_base(settings, library)
    base = _base(spec)
    config, tokenizer = base.config, base.tokenizer
    model = skeleton(config)
    check_against_base(library, base.name, spec != EMBEDDED and Path(spec).is_dir(), linear_shapes(model))
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    earlier = _earlier(name, settings, list(adapters))
    routed = name == "proto_route"
    guess = min(MAX_VARIANTS, len(adapters) + 2) if routed else 1
    variants = settings.n_variants or earlier.get("n_variants") or guess
    work = _work(tokenizer, settings, queries, len(adapters), earlier)
    live = {} if name == "base" else adapters
    speed = measure(config, parameters(model), device, dtype, live, work.prompts)
    ways = {"likely": variants}
    if routed and not earlier and not settings.n_variants:
        ways |= {"low": max(1, variants // 2), "high": MAX_VARIANTS}
    seconds = {way: _seconds(speed, work, adapters, count, routed) for way, count in ways.items()}
    if earlier and routed:
        for found in seconds.values():
            found["prototypes"] = found["calibrate"] = 0.0  # kept on disk since then
    memory = _memory(base, dtype.itemsize, parameters(model), work, adapters, routed)
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


def _is_here(spec: str) -> bool:
    return Path(spec).is_dir() or (LIBRARY / spec).is_dir() or _cached(spec) is not None


def _cached(spec: str) -> Path | None:
    """The folder of a hub repository in the local cache, None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = spec.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


class _BaseModel(NamedTuple):
    config: Any
    tokenizer: Any  # None if it is not here
    name: str
    file_bytes: int  # of its weights, 0 if they are not here


def _base(spec: str) -> _BaseModel:
    """What can be known of the base model without its weights.

    Raises:
        InputError: nothing, or it is broken.
    """
    from transformers import AutoConfig, AutoTokenizer, MistralConfig

    if spec == EMBEDDED:
        folder: Path | None = embedded_folder()
    else:
        folder = Path(spec) if Path(spec).is_dir() else _cached(spec)
    if folder:
        try:
            config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"--base_model {spec}: cannot be loaded from {folder}: {reason}") from error
        size = sum(file.stat().st_size for file in weight_files(folder))
        return _BaseModel(config, tokenizer, EMBEDDED_ID if spec == EMBEDDED else spec, size)
    if spec.partition("@")[0] == COMPETITION_BASE:
        return _BaseModel(MistralConfig(), None, spec, 0)  # its defaults are this model's
    raise InputError(
        f"--plan: the base model {spec} is not here, so nothing is known of its size; fetch it first"
    )


def _encode(tokenizer: Any, texts: list[str], limit: int | None = None) -> list[list[int]]:
    if tokenizer is None:  # about four letters a token
        return [([0] * (1 + len(text) // 4))[:limit] for text in texts]
    from router.predict import encode

    return encode(tokenizer, texts, limit)


def _earlier(name: str, settings: Settings, adapters: list[str]) -> dict[str, Any]:
    """The record of an earlier run of the same method, flags and adapters, or nothing."""
    try:
        record: dict[str, Any] = json.loads((settings.output_folder / "run.json").read_text("utf-8"))
        same = record["flags"] == settings.plain() and sorted(record["adapters"]) == sorted(adapters)
        return record if same and record["method"] == name else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _answer_lengths(tokenizer: Any, settings: Settings, queries: list[Query]) -> list[int]:
    """Tokens of the texts that an earlier run wrote, with the one that ends each; none if they are gone."""
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
    if len(rows) != len(kinds):  # the queries are others now
        return []
    texts = [text for text, kind in zip(rows, kinds, strict=True) if kind == GENERATION]
    return [min(settings.max_gen_len, 1 + len(ids)) for ids in _encode(tokenizer, texts)]


def _work(
    tokenizer: Any, settings: Settings, queries: list[Query], adapters: int, earlier: dict[str, Any],
) -> _Work:  # fmt: skip
    from router.calibration import generic_prompts
    from router.passes import look

    limit, longest = settings.max_seq_len, settings.max_gen_len
    prompts = _encode(tokenizer, [query.input for query in queries], limit)
    distinct = {query.input: ids for query, ids in zip(queries, prompts, strict=True)}
    lengths = _answer_lengths(tokenizer, settings, queries) if earlier else []
    choices = [choice for query in queries for choice in query.choices]
    return _Work(
        prompts=[len(ids) for ids in prompts],
        looked=[len(ids) for ids in look(list(distinct.values()))],
        generic=[len(ids) for ids in look(_encode(tokenizer, generic_prompts(), limit))],
        written=[
            len(ids) + longest
            for ids, query in zip(prompts, queries, strict=True)
            if query.eval_type == GENERATION
        ],
        chosen=sum(map(len, _encode(tokenizer, choices))) if choices else 0,
        answers=np.array(lengths or np.geomspace(1, longest, 64)),
        tried=min(adapters, earlier.get("tried") or TRIED),
        batch_size=settings.batch_size,
    )


def _seconds(
    speed: Speed, work: _Work, adapters: dict[str, AdapterFolder], variants: int, routed: bool
) -> dict[str, float]:
    """Seconds by stage, with a calibration from nothing."""
    from router.predict import BATCH_TOKENS

    found = {"load": 4.0}
    if routed:
        asked = min(len(adapters), round(work.tried * len(work.looked)))  # adapters that any query tries
        found["prototypes"] = speed.prototypes * len(adapters)
        found["calibrate"] = sum(work.generic) * (speed.read + speed.probe) + asked * (
            sum(work.generic[::4]) * speed.read_live + speed.swap
        )
        found["probe"] = sum(work.looked) * speed.probe
        found["trial"] = work.tried * sum(work.looked) * speed.read_live + asked * speed.swap
    found["variants"] = variants * speed.swap / 2
    found["predict"] = sum(work.prompts) * speed.read_live + work.chosen * speed.write_row
    found["predict"] += variants * speed.swap / 2
    if work.written:
        # A variant's last batch is half full, or its only one is as large as the variant.
        full = max(sum(work.written) / BATCH_TOKENS, len(work.written) / (work.batch_size or math.inf))
        batches = max(variants, variants / 2 + full)
        rows = len(work.written) / batches
        steps = float(np.quantile(work.answers, rows / (rows + 1)))  # a batch writes as long as its longest
        each = float(work.answers.mean()) * speed.write_row
        found["predict"] += batches * steps * speed.write + len(work.written) * each
    return found


def _memory(
    base: _BaseModel,
    size: int,
    n_parameters: int,
    work: _Work,
    adapters: dict[str, AdapterFolder],
    routed: bool,
) -> dict[str, float]:
    """Peak resident memory by stage, MiB, on a CPU; `size` is that of a number, bytes."""
    from router.predict import BATCH_TOKENS, CHOICE_TOKENS

    config = base.config
    weights = n_parameters * size
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * size * BATCH_TOKENS if work.written else 0
    logits = CHOICE_TOKENS * config.vocab_size * size if work.chosen else 0
    # The file is mapped while the weights are made of it.
    found = {"load": LIBRARIES + (base.file_bytes or weights) + weights}
    held = LIBRARIES + weights
    if routed:
        own = sum(
            rank * folder.shapes[m][1] for folder in adapters.values() for m, rank in folder.ranks.items()
        )
        modules = len({module for folder in adapters.values() for module in folder.ranks})
        held += 4 * modules * len(adapters) * 2 * len(work.looked)
        found["trial"] = found["probe"] = max(found["load"], held + own * size + KERNELS)
    found["predict"] = max(found["load"], held + KERNELS + 2 * cache, held + KERNELS + logits)
    return {stage: value / 2**20 for stage, value in found.items()}


def lines(found: dict[str, Any], limits: Mapping[str, float | None]) -> list[str]:
    """The plan for a person; last, whether it fits."""
    count, total = len(found["adapters"]), found["total_seconds"]
    rows = [f"{found['method']}: {count} adapters of {found['base']}, {found['queries']} queries, "
            f"{found['prompt_tokens']} prompt tokens, on {found['device']} in {found['dtype']}"]  # fmt: skip
    rows += [
        f"  {name}: rank {a['rank']}, {a['modules']} modules, {a['mib']} MiB"
        for name, a in found["adapters"].items()
    ]
    rows += [f"to be downloaded: {what}" for kind in found["download"].values() for what in kind]
    rows += [f"{stage:>12} {seconds:8.1f} s" for stage, seconds in found["seconds"].items()]
    spread = f", {total[0]:.0f} to {total[2]:.0f} with fewer or more variants" if len(total) == 3 else ""
    where = "an earlier run" if found["known_from_an_earlier_run"] else "a guess"
    rows.append(
        f"about {sum(found['seconds'].values()):.0f} seconds with {found['n_variants']} variants, "
        f"by {where}{spread}"
    )
    if "calibrate" in found["seconds"]:
        rows.append("calibration is kept on disk: a library that was seen before does not need it again")
    peak = max(found["peak_mib"].values())
    rows.append(f"about {peak:.0f} MiB of memory at the peak, {found['disk_mib']} MiB of disk")
    for flag, limit, value, unit in _needs(found, limits):
        verdict = "fits" if value <= limit else "does not fit"
        if math.isinf(value):
            rows.append(f"--{flag} {limit:g} {unit}: not known before the adapters are here")
        else:
            rows.append(f"--{flag} {limit:g} {unit}: {verdict}, about {value:.1f}")
    return rows


def _needs(
    found: dict[str, Any], limits: Mapping[str, float | None]
) -> Iterator[tuple[str, float, float, str]]:
    """Each limit that is set, as (flag, limit, what is needed, unit); infinite while adapters are missing."""
    missing = math.inf if found["download"]["adapters"] else 0.0
    needed = {
        "time_limit": (sum(found["seconds"].values()) / 60, "minutes"),
        "memory_limit": (max(found["peak_mib"].values()) / 1024, "GiB"),
    }
    for flag, (value, unit) in needed.items():
        if (limit := limits[flag]) is not None:
            yield flag, limit, value + missing, unit


def keep(found: dict[str, Any], folder: Path) -> None:
    """Writes plan.json, which a run of the same flags puts beside what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PLAN) as file:
        json.dump(found, file, indent=2)


def kept(folder: Path, name: str, flags: dict[str, Any]) -> dict[str, Any] | None:
    """What plan.json says of a method with these flags; None if it is missing or about another run."""
    try:
        found: dict[str, Any] = json.loads((folder / PLAN).read_text("utf-8"))
        return found if found["method"] == name and found["flags"] == flags else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fits(found: dict[str, Any], limits: Mapping[str, float | None]) -> bool:
    """Whether time (minutes) and memory (GiB) are known to stay below their limits; None is no limit."""
    return all(value <= limit for _, limit, value, _ in _needs(found, limits))
