"""What a run would take, before anything of it is loaded or downloaded: `router.main --plan`.

Adapters are looked at by their headers. Speed is measured, within a minute, on a model of the base model's
configuration with random weights, and where that is large with few layers and scaled to all. What cannot be
known before, how many variants there will be and how long the answers, is taken from an earlier run in the
output folder where there is one of the same queries and adapters. Else it is assumed: two variants more
than adapters, and as many answers between 1 and 2 tokens as between 16 and 32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.folders import WEIGHTS_FILE, AdapterError, AdapterFolder, open_adapter
from router.adapters import find
from router.base import EMBEDDED, EMBEDDED_ID, embedded_folder, pick_device, pick_dtype
from router.clusters import MAX_VARIANTS
from router.constants import COMPETITION, COMPETITION_ADAPTERS, COMPETITION_BASE
from router.errors import InputError
from router.settings import Settings
from router.speed import Speed, measure, parameters
from router.submission import GENERATION, Query, read_queries, read_rows, replacing

PLAN = "plan.json"
TRIED = 1.8  # adapters in question for a query, and
LIVE = 1.1  # a pass with a variant beside one of the base model: both as seen on the committed library
GENERIC = (224, 45)  # generic prompts, and their tokens on average


def plan(name: str, settings: Settings) -> dict[str, Any]:
    """What the run would take, as printed by `lines` and kept in plan.json.

    Raises:
        InputError: queries or adapters that the run would refuse too, or a base model that is not at hand.
    """
    queries = [query for path in settings.dataset_filepaths for query in read_queries(path)]
    adapters, download = _adapters(settings)
    config, tokenizer, base = _base(settings, adapters, download)
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.dtype, device)
    prompts = [len(ids) for ids in _encode(tokenizer, [query.input for query in queries])]
    earlier = _earlier(name, settings, list(adapters))
    routed = name == "proto_route"
    variants = earlier.get("n_variants") or (min(MAX_VARIANTS, len(adapters) + 2) if routed else 1)
    lengths = _answer_lengths(tokenizer, settings, queries) if earlier else []
    answers = np.array(lengths or np.geomspace(1, settings.max_gen_len, 64))  # tokens
    speed = measure(config, device, dtype, adapters, int(np.median(prompts or [1])))
    ways = {"likely": variants}
    if routed and not earlier:
        ways |= {"low": max(1, variants // 2), "high": MAX_VARIANTS}
    seconds = {
        way: _seconds(speed, queries, prompts, adapters, count, answers, settings, routed)
        for way, count in ways.items()
    }
    if earlier and routed:
        for found in seconds.values():
            found["calibrate"] = 0.0  # kept on disk since then
    memory = _memory(config, dtype, queries, adapters, settings, routed)
    size = sum((folder.path / WEIGHTS_FILE).stat().st_size for folder in adapters.values())
    return {
        "method": name,
        "flags": settings.plain(),
        "base": base,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "queries": len(queries),
        "prompt_tokens": sum(prompts),
        "adapters": {
            own: {"rank": max(folder.ranks.values()), "modules": len(folder.ranks),
                  "mib": round((folder.path / WEIGHTS_FILE).stat().st_size / 2**20, 1)}
            for own, folder in adapters.items()
        },
        "download": download,
        "n_variants": variants,
        "known_from_an_earlier_run": bool(earlier),
        "seconds": {stage: round(value, 1) for stage, value in seconds["likely"].items()},
        "total_seconds": [
            round(sum(seconds[way].values()), 1) for way in ("low", "likely", "high") if way in seconds
        ],
        "peak_mib": {stage: round(value) for stage, value in memory.items()},
        "disk_mib": round(variants * size / max(1, len(adapters)) * 1.5 / 2**20 + len(queries) / 1000),
    }  # fmt: skip


def _adapters(settings: Settings) -> tuple[dict[str, AdapterFolder], list[str]]:
    """Adapters by name, by their headers; and what is not here and would be downloaded."""
    specs = COMPETITION_ADAPTERS if settings.adapters == (COMPETITION,) else settings.adapters
    adapters, download = {}, []
    for spec in specs:
        local = Path(spec).is_dir() or (Path("data/library") / spec).is_dir()
        path = None if local else _cached(spec)
        if not local and path is None:
            download.append(f"adapter {spec}")
            continue
        for folder in [path] if path else [found for found, _ in find(spec)]:
            try:
                adapters[spec.rsplit("/", 1)[-1] if path else folder.resolve().name] = open_adapter(folder)
            except AdapterError as error:
                raise InputError(str(error)) from error
    return adapters, download


def _cached(spec: str) -> Path | None:
    """The folder of a hub repository in the local cache, None if it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    name, _, revision = spec.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _base(
    settings: Settings, adapters: dict[str, AdapterFolder], download: list[str]
) -> tuple[Any, Any, str]:
    """The base model's configuration, its tokenizer (None if it is not here) and its name."""
    from transformers import AutoConfig, AutoTokenizer, MistralConfig

    named = {folder.base_model for folder in adapters.values() if folder.base_model}
    spec = settings.base_model or (COMPETITION_BASE if settings.adapters == (COMPETITION,) else None)
    spec = spec or (named.pop() if len(named) == 1 else EMBEDDED)
    if spec.casefold() in (EMBEDDED, EMBEDDED_ID.casefold()):
        folder: Path | None = embedded_folder()
    else:
        folder = Path(spec) if Path(spec).is_dir() else _cached(spec)
    if folder:
        return AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), spec
    download.append(f"base model {spec}")
    if spec.partition("@")[0] == COMPETITION_BASE:
        return MistralConfig(), None, spec  # its defaults are this model's
    raise InputError(
        f"--plan: the base model {spec} is not here, so nothing is known of its size; fetch it first"
    )


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if tokenizer is None:  # about four letters a token
        return [[0] * (1 + len(text) // 4) for text in texts]
    from router.predict import encode

    return encode(tokenizer, texts)


def _earlier(name: str, settings: Settings, adapters: list[str]) -> dict[str, Any]:
    """The record of an earlier run of the same queries and adapters in the output folder, or nothing."""
    try:
        record: dict[str, Any] = json.loads((settings.output_folder / "run.json").read_text("utf-8"))
        files = [Path(path).resolve() for path in record["flags"]["dataset_filepaths"]]
        same = files == [path.resolve() for path in settings.dataset_filepaths]
        return (
            record
            if same and record["method"] == name and sorted(record["adapters"]) == sorted(adapters)
            else {}
        )
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
    texts = [text for text, kind in zip(rows, kinds, strict=False) if kind == GENERATION]
    return [min(settings.max_gen_len, 1 + len(ids)) for ids in _encode(tokenizer, texts)]


def _seconds(
    speed: Speed, queries: list[Query], prompts: list[int], adapters: dict[str, AdapterFolder], variants: int,
    answers: NDArray[np.float64], settings: Settings, routed: bool,
) -> dict[str, float]:  # fmt: skip
    """Seconds by stage, with a calibration from nothing."""
    from router.passes import LOOK
    from router.predict import BATCH_TOKENS

    found = {"load": 4.0}
    if routed:
        seen: dict[str, int] = {query.input: length for query, length in zip(queries, prompts, strict=True)}
        tokens, generic = sum(min(length, LOOK) for length in seen.values()), GENERIC[0] * GENERIC[1]
        tried = min(len(adapters), round(TRIED * len(seen)))
        found["prototypes"] = speed.prototypes * len(adapters)
        found["calibrate"] = generic * (speed.read + speed.probe + LIVE * speed.read * tried / 4)
        found["probe"] = tokens * speed.probe
        found["trial"] = TRIED * tokens * LIVE * speed.read + tried * speed.swap
    found["variants"] = variants * speed.swap / 2
    written = [n for n, query in enumerate(queries) if query.eval_type == GENERATION]
    read = sum(prompts) + sum(sum(1 + len(c) // 4 for c in query.choices) for query in queries)
    rows = max(1, BATCH_TOKENS // (int(np.mean([prompts[n] for n in written] or [1])) + settings.max_gen_len))
    batches = max(variants, len(written) / rows) if written else 0
    together = len(written) / max(1, batches)  # rows of a batch, which writes as long as the longest of them
    steps = float(np.quantile(answers, together / (together + 1)))
    writing = batches * steps * speed.write + len(written) * float(answers.mean()) * speed.write_row
    found["predict"] = LIVE * (read * speed.read + writing) + variants * speed.swap / 2
    return found


def _memory(
    config: Any, dtype: Any, queries: list[Query], adapters: dict[str, AdapterFolder], settings: Settings,
    routed: bool,
) -> dict[str, float]:  # fmt: skip
    """Peak resident memory by stage, MiB."""
    import torch

    from router.predict import BATCH_TOKENS

    bytes_each = torch.empty(0, dtype=dtype).element_size()
    weights = parameters(config) * bytes_each
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * bytes_each * BATCH_TOKENS
    logits = 64 * config.vocab_size * 8
    found = {"load": 700 * 2**20 + weights}  # torch, transformers, peft, faiss
    if routed:
        own = sum(
            rank * folder.shapes[m][1] for folder in adapters.values() for m, rank in folder.ranks.items()
        )
        modules = len({module for folder in adapters.values() for module in folder.ranks})
        measured = 4 * modules * len(adapters) * (2 * len({query.input for query in queries}) + GENERIC[0])
        found["probe"] = found["load"] + own * bytes_each + measured + 100 * 2**20
        found["trial"] = found["probe"]
    found["predict"] = max([*found.values(), max(found.values()) + 2 * cache + logits])
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
    rows += [f"to be downloaded: {what}" for what in found["download"]]
    rows += [f"{stage:>12} {seconds:8.1f} s" for stage, seconds in found["seconds"].items()]
    spread = f", {total[0]:.0f} to {total[2]:.0f} with fewer or more variants" if len(total) == 3 else ""
    where = "an earlier run" if found["known_from_an_earlier_run"] else "a guess"
    rows.append(
        f"about {sum(found['seconds'].values()):.0f} seconds with {found['n_variants']} variants, "
        f"by {where}{spread}"
    )
    rows.append("calibration is kept on disk: a library that was seen before does not need it again")
    peak = max(found["peak_mib"].values())
    rows.append(f"about {peak:.0f} MiB of memory at the peak, {found['disk_mib']} MiB of disk")
    for what, limit, value, unit in (
        ("time_limit", limits["time_limit"], sum(found["seconds"].values()) / 60, "minutes"),
        ("memory_limit", limits["memory_limit"], peak / 1024, "GiB"),
    ):
        if limit is not None:
            verdict = "fits" if value <= limit else "does not fit"
            rows.append(f"--{what} {limit:g} {unit}: {verdict}, about {value:.1f}")
    return rows


def keep(found: dict[str, Any], folder: Path) -> None:
    """Writes plan.json, which a run of the same flags puts beside what it took."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / PLAN) as file:
        json.dump(found, file, indent=2)


def kept(folder: Path, flags: dict[str, Any]) -> dict[str, Any] | None:
    """What plan.json says of a run with these flags; None if it is missing or about another run."""
    try:
        found: dict[str, Any] = json.loads((folder / PLAN).read_text("utf-8"))
        return found if found["flags"] == flags else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fits(found: dict[str, Any], limits: Mapping[str, float | None]) -> bool:
    """Whether time (minutes) and memory (GiB) stay below their limits; None is no limit."""
    minutes, memory = sum(found["seconds"].values()) / 60, max(found["peak_mib"].values()) / 1024
    time_limit, memory_limit = limits["time_limit"], limits["memory_limit"]
    return (time_limit is None or minutes <= time_limit) and (memory_limit is None or memory <= memory_limit)
