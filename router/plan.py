"""The time and memory of a run, before anything is loaded or downloaded: `router.main --plan`.

It reads queries, adapters' headers and the base model's configuration, and measures the pace of a few random
layers like the base model's. The rest is one coarse model of all methods, which rather says too much:

- The base model reads each prompt once beside all adapters before it answers, generic text twice a frame.
- As many variants as adapters are written, and each answers a batch of its own.
- An answer has half the tokens that are allowed, the longest of a batch all of them.

`base` has no adapters, `average` and other static merges make one variant, routers per token answer beside
all adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from timeit import repeat
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from merge.folders import WEIGHTS_FILE, AdapterFolder
from router.constants import COMPETITION
from router.library.adapters import check_against_base, load_library
from router.library.sources import expand, is_here
from router.methods import load_method
from router.methods.average import Average
from router.model import base as models
from router.model.answer import encode, positions
from router.model.apply import picked
from router.model.device import batch_tokens, cache_bytes, pick_device, pick_dtype
from router.model.frames import BARE
from router.model.passes import MAX_TOKENS, forward
from router.model.template import template_for
from router.pipeline.per_token import PerToken
from router.pipeline.reading import check_frame
from router.pipeline.steps import Method, Static, default_base, encoded
from router.queries.submission import GENERATION, read_queries
from router.routing.calibration import generic_prompts
from router.settings import Settings
from router.system.errors import InputError, reason
from router.system.files import is_folder
from router.system.hub import HubError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

START, DISK, SVD = 4.0, 5e8, 1e8  # seconds for imports; bytes a second that are read, or decomposed
LAYERS, ROWS = 2, 4  # of the model that is measured, at least, and prompts that it reads at once
LIBRARIES = 530 << 20  # bytes of torch, transformers, peft, faiss and the others, once in use
KERNELS = 200 << 20  # bytes of what torch compiles and keeps, and of activations, as seen on two cores
RESPONSES = 128 << 20  # bytes of what is measured of prompts that are read together, at most


@dataclass(frozen=True)
class Plan:
    """The time and memory that a run with a method would take."""

    method: str
    base: str
    device: str
    dtype: str
    adapters: list[str]  # their names
    download: list[str]  # the adapters that are not here, which all figures leave out
    left_out: list[str]  # why adapters are, with --skip_bad
    queries: int
    prompt_tokens: int
    seconds: dict[str, float]  # by stage, with nothing kept from an earlier run
    peak_mib: float  # of resident memory, a GPU's counted as the machine's

    def text(self) -> str:
        """The plan for a person."""
        return "\n".join([
            f"{self.method}: {len(self.adapters)} adapters of {self.base}, {self.queries} queries, "
            f"{self.prompt_tokens} prompt tokens, on {self.device} in {self.dtype}",
            *(f"to download: {spec}" for spec in self.download),
            *(f"left out: {why}" for why in self.left_out),
            *(f"{stage:>8} {seconds:8.1f} s" for stage, seconds in self.seconds.items()),
            f"about {sum(self.seconds.values()):.0f} seconds, and {self.peak_mib:.0f} MiB at the peak",
        ])  # fmt: skip

    def over(self, time_limit: float | None, memory_limit: float | None) -> list[str]:
        """A sentence about each limit, of minutes and of GiB, that the run is not known to keep."""
        limits = (
            ("time_limit", time_limit, sum(self.seconds.values()) / 60, "minutes"),
            ("memory_limit", memory_limit, self.peak_mib / 1024, "GiB"),
        )
        more = ", and more with what is to download" if self.download else ""
        return [
            f"--{flag} {limit:g}: expected to take about {value:.1f} {unit}{more}"
            for flag, limit, value, unit in limits
            if limit is not None and (value > limit or more)
        ]


class _Run(NamedTuple):
    """All that decides the cost of a run."""

    method: type[Method]
    settings: Settings
    model: PreTrainedModel  # the base model without weights
    file_bytes: int  # of its weights
    device: torch.device
    folders: list[AdapterFolder]
    prompts: int
    tokens: int  # of all prompts
    texts: int  # queries that are answered with text

    @property
    def factors(self) -> int:
        """How many numbers the adapters' factors have."""
        return sum(
            rank * sum(folder.shapes[module])
            for folder in self.folders
            for module, rank in folder.ranks.items()
        )


def plan(name: str, settings: Settings) -> Plan:
    """Estimates a run with a method.

    Raises:
        InputError: the run itself would refuse its input, the base model is not here, or the cost is not
            known: of a starter-kit method, or of weights that --device_map moves.
    """
    method = load_method(name)
    if not issubclass(method, Method):
        raise InputError(f"--plan: expected -m with a method that routes, got {name}, of the starter kit")
    method.check()
    if settings.device_map:
        raise InputError("--plan: expected no --device_map, since the cost of moving weights is not known")
    queries = [query for path in settings.dataset_filepaths for query in read_queries(path)]
    check_frame(queries, settings.frame)
    specs = expand(settings.adapters)
    bad = list[str]() if settings.skip_bad else None
    here = [spec for spec in specs if is_here(spec)]
    library = load_library(here, local_only=True, bad=bad)
    if not (library or settings.base_model or settings.adapters == (COMPETITION,)):
        raise InputError(
            f"--plan: expected an adapter here, which names its base model, got none; download {specs[0]} "
            "first, or pass --base_model"
        )
    spec = settings.base_model or default_base(settings, library)
    device = torch.device(pick_device(settings.device))
    tokenizer, model, file_bytes = _base(spec, pick_dtype(settings.dtype, device.type))
    base = models.EMBEDDED_ID if spec == models.EMBEDDED else spec
    local = spec != models.EMBEDDED and is_folder(spec)
    library = check_against_base(library, base, local, models.linear_shapes(model), bad)
    template = template_for(tokenizer, settings.chat_template, (adapter.folder.path for adapter in library))
    rows = encoded(template, queries, settings.max_seq_len)
    run = _Run(
        method, settings, model, file_bytes, device,
        folders=[adapter.folder for adapter in library if name != "base"],
        prompts=len(rows), tokens=sum(map(len, rows)),
        texts=sum(query.eval_type == GENERATION for query in queries),
    )  # fmt: skip
    frames = [BARE, *([template.frame] if any(query.messages for query in queries) else [])]
    texts = [text for frame in frames for text in generic_prompts(frame)]
    generic = 2 * sum(map(len, encode(tokenizer, texts, settings.max_seq_len)))  # for means, for responses
    return Plan(
        name, base, device.type, str(model.dtype).removeprefix("torch."),
        adapters=[adapter.name for adapter in library],
        download=[spec for spec in specs if spec not in here], left_out=bad or [],
        queries=len(queries), prompt_tokens=run.tokens,
        seconds=_seconds(run, generic), peak_mib=round(_memory(run) / 2**20, 2),
    )  # fmt: skip


def _base(spec: str, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, int]:
    """A base model's tokenizer, itself without weights, and the bytes of these."""
    try:
        local = models.embedded_folder() if spec == models.EMBEDDED else Path(spec)
        folder = local if is_folder(local) else models.fetched(spec, local_only=True)[0]
        tokenizer, model = models.read(folder, dtype, "meta")
        return tokenizer, model, sum(file.stat().st_size for file in models.weight_files(folder))
    except HubError as error:
        raise InputError(f"--plan: expected the base model {spec} here; download it first") from error
    except Exception as error:  # transformers raises whatever a damaged configuration leads to
        raise InputError(f"--base_model {spec}: cannot be read: {reason(error)}") from error


def _seconds(run: _Run, generic: int) -> dict[str, float]:
    """By stage; `generic` tokens are read first."""
    read, step = _pace(run)
    weights = sum(d_out * d_in for d_out, d_in in models.linear_shapes(run.model).values())
    beside = read * (1 + run.factors / weights)  # a token, with all adapters
    new = run.settings.max_gen_len
    per_token = issubclass(run.method, PerToken)
    single = per_token or issubclass(run.method, (Average, Static))
    variants = 1 if single else run.settings.n_variants or len(run.folders) + 2
    room = batch_tokens(run.model, run.device, run.model.dtype)[0]
    size = run.settings.batch_size or max(1.0, room / (run.tokens / run.prompts + new))
    batches = max(min(run.texts, variants), run.texts / size)
    written = sum((folder.path / WEIGHTS_FILE).stat().st_size for folder in run.folders)
    stages = {
        "load": START + run.file_bytes / DISK,
        "route": 2 * written / SVD + beside * (run.tokens + generic) if run.folders else 0.0,
        "answer": (beside if per_token else read) * (run.tokens + run.texts * new / 2) + step * batches * new,
    }
    return {stage: round(value, 1) for stage, value in stages.items()}


def _pace(run: _Run) -> tuple[float, float]:
    """Seconds to read a prompt token, and for a step in which a batch writes."""
    from transformers import AutoModelForCausalLM

    config, dtype = copy.deepcopy(run.model.config), run.model.dtype
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None) or []
    least = max([LAYERS, *(kinds.index(kind) + 1 for kind in kinds)])  # one of each kind
    layers, text.num_hidden_layers = text.num_hidden_layers, min(least, text.num_hidden_layers)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)  # type: ignore[no-untyped-call]
    models.ready(model, run.device.type)
    head: Any = model.get_output_embeddings()
    length = min(MAX_TOKENS, positions(model))

    def whole(rows: int, length: int) -> float:
        ids = torch.full((rows, length), 5, device=run.device)
        few = _timed(lambda: forward(model, ids, torch.ones_like(ids)).sum().item())
        return last + max(0.0, few - last) * float(layers / text.num_hidden_layers)

    with torch.inference_mode():
        state = torch.zeros(1, head.in_features, dtype=dtype, device=run.device)
        last = _timed(lambda: head(state).sum().item())
        return whole(ROWS, length) / (ROWS * length), whole(1, 1)


def _timed(work: Callable[[], Any]) -> float:
    """The fastest of three calls, after one that warms up."""
    return min(repeat(work, number=1, repeat=4)[1:])


def _memory(run: _Run) -> int:
    """Bytes at the peak."""
    config, dtype = run.model.config, run.model.dtype
    size = dtype.itemsize
    weights = run.model.num_parameters() * size
    shapes = {module: shape for folder in run.folders for module, shape in folder.shapes.items()}
    copied = 0
    if run.settings.engine == "vllm":
        copied = weights  # it loads them once more
    elif picked(run.model, run.device, run.settings.apply) == "merged":
        copied = sum(d_out * d_in for d_out, d_in in shapes.values()) * size  # what an adapter changes
    written, chosen = batch_tokens(run.model, run.device, dtype)
    logits = chosen * config.get_text_config(decoder=True).vocab_size * size
    longest = max(written, run.settings.max_gen_len)
    work = max(RESPONSES, 2 * cache_bytes(config, dtype) * longest, logits)
    held = KERNELS + 4 * run.factors + 16 * len(run.folders) * run.prompts + copied + work
    return int(LIBRARIES + weights + max(run.file_bytes, held))  # the file stays mapped while it is read
