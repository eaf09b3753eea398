"""Estimates seconds and memory of a run before anything is loaded or downloaded: `router.main --plan`.

It measures the pace of a model with two random layers like the base model's, and how long decomposing one
adapter takes. It reads queries and adapters. The rest is a coarse model of what kinds of methods do:

- `base`, `average` and static merges read no prompt before they answer it, and make one variant.
- Routers per query decompose the adapters, and read each prompt beside all of them before they answer it:
  `proto_route` at most 128 tokens of it, and generic text once for a library; `oracle` and `cards` nothing.
  They are taken to make two variants more than there are adapters.
- Routers per token do so too, answer beside all adapters, and make no variant.

An answer is taken to have half the tokens that are allowed, the longest of a batch all of them.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from timeit import repeat
from typing import Any, NamedTuple

import torch

from merge.factors import stacks, svd
from merge.folders import WEIGHTS_FILE, AdapterFolder
from router.constants import COMPETITION_BASE
from router.library.adapters import check_against_base, load_library
from router.library.sources import expand, is_here
from router.methods import load_method
from router.model import base as models
from router.model.answer import encode, positions
from router.model.apply import picked
from router.model.device import batch_tokens, cache_bytes, pick_device, pick_dtype, tokens_at_once
from router.model.passes import MAX_TOKENS, forward
from router.pipeline.per_token import PerToken
from router.pipeline.steps import Routed, Static, default_base
from router.queries.submission import GENERATION, read_queries
from router.routing.calibration import generic_prompts
from router.routing.clusters import most_variants
from router.settings import Settings
from router.system.errors import InputError, reason
from router.system.files import is_folder, replacing
from router.system.hub import HubError

PLAN = "plan.json"
WITHOUT_PASS = ("base", "average", "oracle", "cards")  # and static merges
START, DISK = 4.0, 5e8  # seconds for imports; bytes of weights that are read and hashed in a second
LAYERS, ROWS = 2, 4  # of the model that is measured, and prompts that it reads at once
LIBRARIES = 530 << 20  # bytes of torch, transformers, peft, faiss and the others, once in use
KERNELS = 200 << 20  # bytes of what torch compiles and keeps, and of activations, as seen on two cores
RESPONSES = 128 << 20  # bytes of what is measured of prompts that are read together, at most


def plan(name: str, settings: Settings) -> dict[str, Any]:
    """What a run with a method would take, as plan.json has it: seconds and MiB by stage, among others.

    `calibrate` is what is kept for the next run with the same library, `route` all else before the variants.

    Raises:
        InputError: the run itself would refuse its input, the base model's configuration is not here, or the
            cost is not known: of a starter-kit method, or of weights that --device_map moves.
    """
    method = load_method(name)
    if not issubclass(method, Routed):
        raise InputError(f"--plan: expected -m with a method that routes, got {name}, of the starter kit")
    if settings.device_map:
        raise InputError("--plan: expected no --device_map, since the cost of moving weights is not known")
    queries = [query for path in settings.dataset_filepaths for query in read_queries(path)]
    specs, bad = expand(settings.adapters), list[str]() if settings.skip_bad else None
    here = [spec for spec in specs if is_here(spec)]
    library = load_library(here, local_only=True, bad=bad)
    spec = settings.base_model or default_base(settings, library)
    base = _base(spec)
    with torch.device("meta"):
        model = _random(base.config)
    local = spec != models.EMBEDDED and is_folder(spec)
    library = check_against_base(library, base.name, local, models.linear_shapes(model), bad)
    device = torch.device(pick_device(settings.device))
    run = _Run(
        name, method, settings, base, model, device, pick_dtype(settings.dtype, device.type),
        adapters=[adapter.folder for adapter in library],
        prompts=_lengths(base, [query.input for query in queries], settings.max_seq_len),
        texts=sum(query.eval_type == GENERATION for query in queries),
    )  # fmt: skip
    seconds, memory = _seconds(run), _memory(run)
    return {
        "method": name, "flags": settings.plain(), "base": base.name, "device": device.type,
        "dtype": str(run.dtype).removeprefix("torch."), "queries": len(queries),
        "prompt_tokens": sum(run.prompts),
        "adapters": {
            own.name: {"rank": max(own.folder.ranks.values()), "modules": len(own.folder.ranks),
                       "mib": round((own.folder.path / WEIGHTS_FILE).stat().st_size / 2**20, 1)}
            for own in library
        },
        "download": {
            "adapters": [one for one in specs if one not in here],
            "base": [] if base.file_bytes else [spec],
        },
        "n_variants": run.variants,
        "seconds": {stage: round(value, 1) for stage, value in seconds.items()},
        "total_seconds": round(sum(seconds.values()), 1),
        "peak_mib": {stage: round(value / 2**20, 2) for stage, value in memory.items()},
    }  # fmt: skip


class _Base(NamedTuple):
    """What is known of a base model without its weights."""

    config: Any
    tokenizer: Any  # None if it is not here
    name: str
    file_bytes: int  # of its weights, 0 if they are not here


@dataclass(frozen=True)
class _Run:
    name: str
    method: type
    settings: Settings
    base: _Base
    model: Any  # without weights
    device: torch.device
    dtype: torch.dtype
    adapters: list[AdapterFolder]
    prompts: list[int]  # tokens of each
    texts: int  # queries that are answered with text

    @property
    def passes(self) -> bool:
        """Whether the base model reads the prompts before they are answered."""
        return self.name not in WITHOUT_PASS and not issubclass(self.method, Static)

    @property
    def variants(self) -> int:
        if self.name in ("base", "average") or issubclass(self.method, (Static, PerToken)):
            return 1
        many = len(self.adapters)
        return self.settings.n_variants or min(most_variants(many + 1), many + 2)

    def factors(self, outputs: bool) -> int:
        """How many numbers the adapters' input factors have, with `outputs` also their output factors."""
        return sum(
            rank * (of.shapes[module][1] + outputs * of.shapes[module][0])
            for of in self.adapters
            for module, rank in of.ranks.items()
        )


def _base(spec: str) -> _Base:
    from transformers import AutoConfig, AutoTokenizer, MistralConfig

    try:
        local = models.embedded_folder() if spec == models.EMBEDDED else Path(spec)
        folder = local if is_folder(local) else models.fetched(spec, local_only=True)[0]
    except HubError as error:
        if spec.partition("@")[0] == COMPETITION_BASE:
            return _Base(MistralConfig(), None, spec, 0)  # its defaults are this model's
        raise InputError(
            f"--plan: the base model {spec} is not here, so nothing is known of its size; fetch it first"
        ) from error
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        size = sum(file.stat().st_size for file in models.weight_files(folder))
    except Exception as error:  # transformers raises whatever a damaged configuration leads to
        raise InputError(f"--base_model {spec}: cannot be loaded from {folder}: {reason(error)}") from error
    return _Base(config, tokenizer, models.EMBEDDED_ID if spec == models.EMBEDDED else spec, size)


def _random(config: Any, **how: Any) -> Any:
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    return build(config, **how)


def _lengths(base: _Base, texts: Sequence[str], limit: int | None) -> list[int]:
    """Tokens of each text, at most `limit`."""
    if base.tokenizer is None:  # about four letters a token
        return [min(1 + len(text) // 4, limit or len(text) + 1) for text in texts]
    return [len(ids) for ids in encode(base.tokenizer, texts, limit)]


def _seconds(run: _Run) -> dict[str, float]:
    """By stage, with nothing kept from an earlier run."""
    read, step, adapter = _pace(run)
    layers = sum(d_out * d_in for d_out, d_in in models.linear_shapes(run.model).values())
    beside = read * (1 + run.factors(outputs=True) / layers)  # a token, with all adapters
    library, total, new = adapter * len(run.adapters), sum(run.prompts), run.settings.max_gen_len
    per_token = issubclass(run.method, PerToken)
    found = {"load": START + run.base.file_bytes / DISK}
    if run.name == "proto_route":
        generic = _lengths(run.base, generic_prompts(), run.settings.max_seq_len)
        found["calibrate"] = library + beside * sum(min(n, MAX_TOKENS) for n in generic)
        found["route"] = beside * sum(min(n, MAX_TOKENS) for n in run.prompts)
    elif run.passes:
        found["route"] = library + beside * total
    if run.name != "base" and not per_token:
        found["variants"] = library if run.variants == 1 else adapter * run.variants
    room = batch_tokens(run.model, run.device, run.dtype)[0]
    size = run.settings.batch_size or max(1.0, room / (total / len(run.prompts) + new))
    batches = max(min(run.texts, run.variants), run.texts / size)
    each = beside if per_token else read
    found["predict"] = each * (total + run.texts * new / 2) + step * batches * new
    return found


def _pace(run: _Run) -> tuple[float, float, float]:
    """Seconds to read a prompt token, for a step in which a batch writes, and to decompose an adapter."""
    config = copy.deepcopy(run.base.config)
    text = config.get_text_config(decoder=True)
    layers, text.num_hidden_layers = text.num_hidden_layers, min(LAYERS, text.num_hidden_layers)
    model = models.ready(_random(config, dtype=run.dtype), run.device.type)
    head: Any = model.get_output_embeddings()
    length = min(MAX_TOKENS, positions(model))

    def whole(rows: int, length: int) -> float:
        ids = torch.full((rows, length), 5, device=run.device)
        few = _timed(lambda: forward(model, ids, torch.ones_like(ids)).sum().item())
        return last + max(0.0, few - last) * float(layers / text.num_hidden_layers)

    with torch.inference_mode():
        state = torch.zeros(1, head.in_features, dtype=run.dtype, device=run.device)
        last = _timed(lambda: head(state).sum().item())
        read, step = whole(ROWS, length) / (ROWS * length), whole(1, 1)
    if not run.adapters:
        return read, step, 0.0
    middle = sorted(run.adapters, key=lambda of: sum(of.ranks.values()))[len(run.adapters) // 2]
    return read, step, _timed(lambda: [svd(stack) for _, stack in stacks(middle.read_all())])


def _timed(work: Callable[[], Any]) -> float:
    """The fastest of three calls, after one that warms up."""
    return min(repeat(work, number=1, repeat=4)[1:])


def _memory(run: _Run) -> dict[str, float]:
    """Peak resident bytes by stage, a GPU's counted as the machine's."""
    size, queries, config = run.dtype.itemsize, len(run.prompts), run.base.config
    weights = run.model.num_parameters() * size
    shapes = {module: shape for of in run.adapters for module, shape in of.shapes.items()}
    ranks = sum((Counter(of.ranks) for of in run.adapters), Counter[str]())  # of all adapters, by module
    products = 12 * max(ranks.values(), default=0) * tokens_at_once(run.device, run.dtype)  # three arrays
    found = {"load": LIBRARIES + (run.base.file_bytes or weights) + weights}  # the file stays mapped
    held = LIBRARIES + KERNELS + weights
    if run.name == "proto_route":
        one = 8 * len(shapes) * len(run.adapters)  # what is measured of a prompt: float32, in two views
        evidence = (4 * len(shapes) + 16 * len(run.adapters)) * queries  # and the weights
        held += run.factors(outputs=False) * size + evidence
        # Of generic text there are a copy and what the gate learns, and then the queries come.
        found["route"] = held + products + 3 * one * len(generic_prompts()) + RESPONSES + evidence
    elif run.name != "base":
        held += 4 * run.factors(outputs=True)
        found["route"] = held + products * run.passes
    if run.settings.engine == "vllm":
        held += weights  # it loads them once more
    elif run.name != "base" and picked(run.model, run.device, run.dtype, run.settings.apply) == "merged":
        held += sum(d_out * d_in for d_out, d_in in shapes.values()) * size  # a copy of what changes
    written, chosen = batch_tokens(run.model, run.device, run.dtype)
    logits = chosen * config.get_text_config(decoder=True).vocab_size * size
    found["predict"] = held + max(2 * cache_bytes(config, run.dtype) * written, logits)
    return {stage: max(found["load"], value) for stage, value in found.items()}


def keep(found: dict[str, Any], folder: Path) -> None:
    """Writes plan.json."""
    with replacing(folder / PLAN) as file:
        json.dump(found, file, indent=2)


def lines(found: dict[str, Any]) -> list[str]:
    """The plan as text for a person."""
    return [
        f"{found['method']}: {len(found['adapters'])} adapters of {found['base']}, {found['queries']} "
        f"queries, {found['prompt_tokens']} prompt tokens, on {found['device']} in {found['dtype']}",
        *(f"  {name}: rank {of['rank']}, {of['modules']} modules, {of['mib']} MiB"
          for name, of in found["adapters"].items()),
        *(f"to download: {spec}" for specs in found["download"].values() for spec in specs),
        *(f"{stage:>12} {seconds:8.1f} s" for stage, seconds in found["seconds"].items()),
        *(f"{stage:>12} {mib:8.0f} MiB at the peak" for stage, mib in found["peak_mib"].items()),
        f"about {found['total_seconds']:.0f} seconds with {found['n_variants']} variants, a coarse estimate",
    ]  # fmt: skip


def against(found: dict[str, Any], limits: Mapping[str, float | None]) -> dict[str, bool]:
    """A sentence about each limit that is set, and whether the plan is known to stay below it.

    Args:
        limits: `time_limit` in minutes and `memory_limit` in GiB; None is no limit.
    """
    needs = {
        "time_limit": (found["total_seconds"] / 60, "minutes"),
        "memory_limit": (max(found["peak_mib"].values()) / 1024, "GiB"),
    }
    verdicts = {}
    for flag, (value, unit) in needs.items():
        if (limit := limits[flag]) is not None:
            known, fits = not found["download"]["adapters"], value <= limit
            verdict = f"{'fits' if fits else 'does not fit'}, about {value:.1f}"
            said = verdict if known else "unknown until the adapters are here"
            verdicts[f"--{flag} {limit:g} {unit}: {said}"] = known and fits
    return verdicts
