"""The measurements. Each runs in a process of its own and returns numbers, seconds if not named otherwise.

Everything that is compared runs on the same queries, the embedded base model and the same adapters. Whole
runs find prototypes and calibration on disk, except for a library's first, whose calibration is not counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from merge.factors import Factors, recompress, weighted_sum
from merge.folders import WEIGHTS_FILE, write_adapter
from router.answering import answered
from router.constants import LIBRARY, Apply
from router.context import Context
from router.library.adapters import Adapter, load_library
from router.methods import load_method
from router.model import passes
from router.model.answer import encode, generate
from router.model.apply import Beside, active
from router.model.base import EMBEDDED, Base, linear_shapes, load_base
from router.model.passes import batches, forward
from router.per_token import attached, load_experts
from router.pipeline import Routed
from router.routing.calibration import Calibration
from router.routing.clusters import cluster
from router.routing.gate import PrototypeGate
from router.routing.probe import probe
from router.routing.prototypes import prototypes
from router.settings import Settings
from router.stages import peak_mib
from router.submission import MULTIPLE_CHOICE, Query, read_queries
from scripts.bench import libraries
from scripts.bench.libraries import empty_cache
from scripts.bench.score import COPY
from scripts.bench.speed.shape import shape
from scripts.bench.timer import repeated, timed

COMPETITION_CSV = Path("../shared/competition/test.csv")
SEED = 4
NEW_TOKENS = 64
LARGEST = 256  # adapters


def queries(every: int = 1) -> list[Query]:
    """The competition's queries where they are at hand, else ours; every so many."""
    path = COMPETITION_CSV if COMPETITION_CSV.exists() else Path("data/test.csv")
    return read_queries(path)[::every]


def prompts(base: Base, asked: Sequence[Query], most: int | None = None) -> list[list[int]]:
    """Token ids of the queries' prompts."""
    return encode(base.tokenizer, [query.input for query in asked], most)


def library(size: int) -> list[Adapter]:
    """The first adapters of the committed library, and perturbed copies after them, of each one in turns."""
    own = load_library([str(LIBRARY)])
    if size <= len(own):
        return own[:size]
    copies = libraries.grown(own, LARGEST)[len(own) :]
    return (own + sorted(copies, key=lambda copy: copy.name.rpartition(COPY)[2]))[:size]


def uniform(base: Base, rank: int = 8) -> list[Adapter]:
    """8 adapters of one rank and the same targets, as PEFT's Arrow wants them."""
    return libraries.uniform(base.model, base.name, rank, 8, libraries.FOLDER / f"uniform{rank}")


def _method(name: str, base: Base, adapters: Sequence[Adapter], folder: str | Path) -> Any:
    method: Any = load_method(name)
    return method(name, base, adapters, Context(Settings(output_folder=Path(folder))))


def routed(size: str, every: str) -> dict[str, Any]:
    """A whole routed run except for loading, by stage."""
    base, adapters, asked = load_base(EMBEDDED), library(int(size)), queries(int(every))
    with tempfile.TemporaryDirectory() as folder:
        method: Routed = _method("proto_route", base, adapters, folder)
        seconds, result = timed(lambda: method.answer(asked))
    decision = result.decision
    assert decision  # proto_route has one
    stages = {stage: round(value, 3) for stage, value in method.stages.seconds.items()}
    # Calibration is once for a library: where this process was the first to see it, it is not counted.
    return {
        "seconds": seconds - stages["calibrate"], "stages": stages, "peak_mib": peak_mib(),
        "variants": len(decision.variants), "queries": len(asked),
    }  # fmt: skip


def demo(_: str) -> dict[str, Any]:
    """The command of the demo with nothing on disk but the installed packages, from its start to its end."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "router.main", "-m", "proto_route", "--output_folder", folder]
        environment = os.environ | {"PROTO_ROUTE_CACHE": f"{folder}/cache"}
        seconds = timed(lambda: subprocess.run(command, check=True, env=environment))[0]
        stages = json.loads((Path(folder) / "run.json").read_text("utf-8"))["seconds"]
    return {"seconds": seconds, "stages": stages}


def truncation(tokens: str) -> dict[str, Any]:
    """Where long prompts go when routing reads at most so many tokens of each; 0: all of them."""
    base, adapters = load_base(EMBEDDED), library(22)
    asked = [query for query in queries() if len(prompts(base, [query])[0]) > passes.MAX_TOKENS][::2]
    passes.MAX_TOKENS = int(tokens) or sys.maxsize  # of generic prompts too
    with tempfile.TemporaryDirectory() as folder:
        method: Routed = _method("proto_route", base, adapters, folder)
        routing = method.route(asked, method.encoded(asked))
    return {"top": routing.weights.argmax(1).tolist(), "queries": len(asked)}


def _average(base: Base, folder: str) -> Any:
    """The base model with the mean of the library merged into its weights by PEFT."""
    method = _method("average", base, library(22), folder)
    method.answer(queries()[:1])
    model = Beside(base).activate(Path(folder) / "variants" / "0")
    model.merge_adapter()
    return model


def static(every: str) -> dict[str, Any]:
    """The same answers from one static average that is merged into the weights already."""
    base, asked = load_base(EMBEDDED), queries(int(every))
    with tempfile.TemporaryDirectory() as folder:
        model = _average(base, folder)
        seconds, _ = timed(lambda: answered(model, base.tokenizer, asked, prompts(base, asked), Context()))
    return {"seconds": seconds, "peak_mib": peak_mib(), "queries": len(asked)}


def kit(every: str) -> dict[str, Any]:
    """The same in the starter kit's way: one query at a time, every choice a full pass."""
    base, asked = load_base(EMBEDDED), queries(int(every))
    tokenizer: Any = base.tokenizer

    def ask(query: Query, model: Any) -> None:
        (ids,) = prompts(base, [query])
        if query.eval_type != MULTIPLE_CHOICE:
            row, how = torch.tensor([ids]), {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            how["pad_token_id"] = tokenizer.pad_token_id
            model.generate(input_ids=row, attention_mask=torch.ones_like(row), **how)
            return
        for choice in tokenizer(list(query.choices), add_special_tokens=False)["input_ids"]:
            row = torch.tensor([[*ids, *choice, tokenizer.eos_token_id]])
            model(input_ids=row).logits.log_softmax(-1)

    def ask_all(model: Any) -> None:
        for query in asked:
            ask(query, model)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = _average(base, folder)
        seconds, _ = timed(lambda: ask_all(model))
    return {"seconds": seconds, "peak_mib": peak_mib(), "queries": len(asked)}


def _one(base: Base, adapter: Adapter, folder: str) -> Path:
    """An adapter as the variant of it alone that would answer."""
    path = Path(folder) / "one"
    write_adapter(path, dict(adapter.read_all()), base.name, base.revision, base.model.dtype)
    return path


def floor() -> dict[str, Any]:
    """Memory of the base model, one variant and its largest batches: what no run can do without."""
    base, asked = load_base(EMBEDDED), queries()
    longest = sorted(asked, key=lambda query: -len(query.input))
    largest = [*longest[:8], *[query for query in longest if query.eval_type == MULTIPLE_CHOICE][:8]]
    with tempfile.TemporaryDirectory() as folder, active(base, _one(base, library(1)[0], folder)) as model:
        answered(model, base.tokenizer, largest, prompts(base, largest), Context())
    return {"peak_mib": peak_mib()}


def decode(way: str) -> dict[str, Any]:
    """16 prompts of 32 tokens that write 64 each, with 8 adapters of one rank on all layers.

    Args:
        way: a variant `merged` or `beside`, or `arrow`, `spectr`, `lag`.
    """
    base = load_base(EMBEDDED)
    base.tokenizer.eos_token = "<file_sep>"  # of no use to the model: nothing ends early
    adapters, dtype = uniform(base), base.model.dtype
    rows = encode(base.tokenizer, [query.input * 8 for query in queries()[:16]], 32)

    def measured(model: Any) -> dict[str, Any]:
        generate(model, base.tokenizer, rows, 2)  # warm
        seconds, found = timed(lambda: generate(model, base.tokenizer, rows, NEW_TOKENS))
        return {"seconds": seconds, "tokens": sum(len(one.ids) for one in found)}

    if way == "arrow":
        from peft import ArrowConfig
        from peft.tuners.lora.arrow import create_arrow_model

        paths = [str(adapter.folder.path) for adapter in adapters]
        model: Any = create_arrow_model(base.model, paths, ArrowConfig(top_k=3), autocast_adapter_dtype=False)
        return measured(model.to(dtype).eval())
    with tempfile.TemporaryDirectory() as folder:
        if way in ("spectr", "lag"):
            method = _method(way, base, adapters, folder)
            with attached(base.model, load_experts(adapters, "cpu", dtype), method.weigh):
                return measured(base.model)
        updates = {
            module: weighted_sum([adapter.read(module) for adapter in adapters[:3]], [0.6, 0.3, 0.1])
            for module in linear_shapes(base.model)
        }
        write_adapter(Path(folder), updates, base.name, None, dtype)
        how: Apply = "merged" if way == "merged" else "beside"
        with active(base, Path(folder), how) as model:
            return measured(model)


def merge(way: str, where: str, rank: str) -> dict[str, Any]:
    """A mix of adapters as one of the given rank: exact sum and recompression, or PEFT's dense SVD.

    Args:
        way: `ours` or `peft`.
        where: `embedded`, three of 8 uniform adapters on all layers, or `large`, 27 on one layer of
            14336 x 4096, as Mistral's down projection.
        rank: of the adapters and of the result.
    """
    r = int(rank)
    if where == "large":
        generator = torch.Generator().manual_seed(SEED)
        parts = {
            "down_proj": [
                Factors(torch.randn(r, 14336, generator=generator), torch.randn(4096, r, generator=generator))
                for _ in range(27)
            ]
        }
        model: Any = torch.nn.Sequential()
        model.add_module("down_proj", torch.nn.Linear(14336, 4096, bias=False))
    else:
        base = load_base(EMBEDDED, dtype="float32")
        adapters = uniform(base, r)[:3]
        parts = {m: [adapter.read(m) for adapter in adapters] for m in linear_shapes(base.model)}
        model = base.model
    count = len(next(iter(parts.values())))
    weights = [1 / count] * count
    if way == "ours":
        mixes = repeated(lambda: [recompress(weighted_sum(found, weights), r) for found in parts.values()], 5)
        return {"seconds": mixes.median}
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=r, target_modules=sorted({name.split(".")[-1] for name in parts}))
    model = get_peft_model(model, config, adapter_name="0")
    for n in range(1, count):
        model.add_adapter(str(n), config)
    for name, found in parts.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        for n, update in enumerate(found):
            layer.lora_A[str(n)].weight.data.copy_(update.a)
            layer.lora_B[str(n)].weight.data.copy_(update.b)
    names, how = [str(n) for n in range(count)], {"combination_type": "svd", "svd_rank": r}
    seconds, _ = timed(lambda: model.add_weighted_adapter(names, weights, "sum", **how))
    return {"seconds": seconds}


def library_prototypes(size: str) -> dict[str, Any]:
    """Prototypes of a library, from nothing and from disk, and merely reading the adapters."""
    adapters = library(int(size))
    read = repeated(lambda: [list(adapter.read_all()) for adapter in adapters], 3)
    with empty_cache():
        prototypes(adapters[:1])  # warm
    new, known = [], []
    for _ in range(3):
        with empty_cache():
            new.append(timed(lambda: prototypes(adapters))[0])
            known.append(timed(lambda: prototypes(adapters))[0])
    mib = sum((a.folder.path / WEIGHTS_FILE).stat().st_size for a in adapters) / 2**20
    return {"read": min(read.times), "seconds": min(new), "cached": min(known), "mib": mib}


def probing(count: str) -> dict[str, Any]:
    """The probe of so many queries with the committed library, and a pass that only reads them, in turns."""
    base, adapters = load_base(EMBEDDED), library(22)
    rows = passes.truncated(prompts(base, queries()))[:: max(1, len(queries()) // int(count))]
    pad = base.tokenizer.pad_token_id
    protos = prototypes(adapters, dtype=base.model.dtype)
    means = Calibration(base).means(list(protos))

    def read(part: list[list[int]]) -> None:
        with torch.inference_mode():
            list(batches(base.model, part, pad, None, partial(forward, base.model)))

    def work(part: list[list[int]]) -> None:
        probe(base.model, part, pad, protos, means, len(adapters), None)

    for warm in (read, work):
        warm(rows[:8])
    turns = [[timed(partial(one, rows))[0] for one in (work, read)] for _ in range(3)]
    ratios = [probed / plain for probed, plain in turns]
    seconds, plain = (median(column) for column in zip(*turns, strict=True))
    return {"seconds": seconds, "read": plain, "ratios": ratios, "tokens": sum(map(len, rows))}


def same(every: str) -> dict[str, Any]:
    """How many answers of one adapter differ where it is merged into the weights from beside them."""
    base, asked = load_base(EMBEDDED), queries(int(every))
    adapter = next(a for a in library(22) if a.name == "chain_sum")
    told, taken = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = _one(base, adapter, folder)
        ways: tuple[Apply, ...] = ("merged", "beside")
        for how in ways:
            with active(base, path, how) as model:
                seconds, found = timed(
                    lambda: answered(model, base.tokenizer, asked, prompts(base, asked), Context())
                )
            taken.append(seconds)
            told.append([one.text for one in found])
    differ = sum(one != two for one, two in zip(*told, strict=True))
    return {"differ": differ, "queries": len(asked), "merged": taken[0], "beside": taken[1]}


def gate(count: str, size: str) -> dict[str, Any]:
    """Gate and clusters on drawn responses of the shape that real ones have."""
    rng = np.random.default_rng(SEED)
    n, modules = int(size), 210
    level = rng.uniform(0.05, 0.2, (1, n, modules, 2)).astype(np.float32)

    def drawn(rows: int) -> Any:
        noise = rng.standard_normal((rows, n, modules, 2), dtype=np.float32)
        return level * np.exp(0.1 * noise)

    responses = drawn(int(count))
    responses[np.arange(int(count)), rng.integers(n, size=int(count))] *= 1.2  # one that stands out
    estimator = PrototypeGate().fit(drawn(64))

    def work() -> None:
        scores = estimator.decision_function(responses)
        estimator.votes(responses, scores)
        cluster(estimator.weights(estimator.candidate_scores(scores)), None, 0)

    return {"seconds": timed(work)[0]}


def matmul_share(every: str) -> dict[str, Any]:
    """What prediction with one variant spends its time on, by operator, from torch's profiler."""
    base, asked = load_base(EMBEDDED), queries(int(every))
    adapter = next(a for a in library(22) if a.name == "chain_sum")
    with (
        tempfile.TemporaryDirectory() as folder,
        active(base, _one(base, adapter, folder)) as model,
        profile(activities=[ProfilerActivity.CPU]) as seen,
    ):
        answered(model, base.tokenizer, asked, prompts(base, asked), Context())
    events = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
    largest = sorted(events.items(), key=lambda event: -event[1])[:14]
    return {"seconds": sum(events.values()), "operators": {key: round(value, 3) for key, value in largest}}


def roofline() -> dict[str, Any]:
    """The machine's GEMM and memory speed, and what a pass over prompts reaches."""
    base = load_base(EMBEDDED)
    shapes, dtype = linear_shapes(base.model), base.model.dtype
    model: Any = base.model
    a, w = torch.randn(512, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    block = torch.randn(64 << 20)
    rows = prompts(base, queries(8), 128)

    def read() -> None:
        with torch.inference_mode():
            list(batches(model, rows, base.tokenizer.pad_token_id, None, partial(forward, model)))

    return {
        "gemm_flops": 2 * 512 * 576 * 1536 / _fastest(lambda: torch.nn.functional.linear(a, w)),
        "bytes": block.numel() * 4 / _fastest(block.sum),
        "linear": sum(d_out * d_in for d_out, d_in in shapes.values()),
        "head": model.get_output_embeddings().weight.numel(),
        "dtype": str(dtype).removeprefix("torch."),
        "itemsize": dtype.itemsize,
        "read_tokens": sum(map(len, rows)) / repeated(read, 1).median,
    }


def _fastest(work: Callable[[], Any]) -> float:
    """Seconds of a call in the fastest of five rows of five."""
    return min(repeated(lambda: [work() for _ in range(5)], 5).times) / 5


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f
    for f in (
        routed, static, kit, floor, decode, merge, library_prototypes, gate, matmul_share, roofline,
        truncation, probing, same, shape, demo,
    )
}  # fmt: skip


def run(words: Sequence[str]) -> dict[str, Any]:
    """One measurement by its name and arguments."""
    return MEASURES[words[0]](*words[1:])
