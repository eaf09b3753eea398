"""The measurements. Each runs in a process of its own and returns numbers, seconds if not named otherwise.

Everything that is compared runs on the same queries, the embedded base model and the same adapters. Whole
runs find prototypes and calibration on disk, but for a library's first, whose calibration is not counted.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from merge.factors import Factors, recompress, weighted_sum
from merge.folders import WEIGHTS_FILE, write_adapter
from router import passes
from router.adapters import Adapter, load_library
from router.base import EMBEDDED, Base, linear_shapes, load_base
from router.calibration import Calibration
from router.clusters import cluster
from router.constants import LIBRARY
from router.gate import PrototypeGate, weights_of
from router.merges import Routed
from router.methods import load_method
from router.passes import batches, forward
from router.per_token import attached, load_experts
from router.predict import answer, encode, generate
from router.probe import probe
from router.prototypes import prototypes
from router.settings import Settings
from router.submission import MULTIPLE_CHOICE, Query, read_queries
from router.variants import Hotswap, live
from scripts.bench_speed.clean import empty_cache

COMPETITION_CSV = Path("../shared/competition/test.csv")
FOLDER = Path("output/benchmark/speed_libraries")
SEED = 4
NEW_TOKENS = 64
UNIFORM = 8  # adapters of one rank and the same targets, as PEFT's Arrow wants them
UNIFORM_RANK = 8


def queries(every: int = 1) -> list[Query]:
    """The competition's queries where they are at hand, else ours; every so many."""
    path = COMPETITION_CSV if COMPETITION_CSV.exists() else Path("data/test.csv")
    return read_queries(path)[::every]


def library(size: int) -> list[Adapter]:
    """The first adapters of the committed library, and seeded copies with perturbed weights after them."""
    own = load_library([str(LIBRARY)])
    for n in range(len(own), size):
        source = own[n % len(own)]
        path = FOLDER / f"{source.name}~{n:03}"
        if not path.exists():
            generator = torch.Generator().manual_seed(SEED + n)
            noise = [(name, _perturbed(update, generator)) for name, update in source.read_all()]
            write_adapter(path, dict(noise), source.folder.base_model, None, torch.bfloat16)
        own += load_library([str(path)])
    return own[:size]


def _perturbed(update: Factors, generator: torch.Generator) -> Factors:
    noise = (torch.randn(x.shape, generator=generator) for x in update)
    return Factors(*(x + 0.1 * x.norm() * e / e.norm() for x, e in zip(update, noise, strict=True)))


def uniform(base: Base, rank: int = UNIFORM_RANK, count: int = UNIFORM) -> list[Adapter]:
    """Seeded random adapters of one rank on all linear layers, as small as trained ones."""
    generator = torch.Generator().manual_seed(SEED)
    for n in range(count):
        path = FOLDER / f"uniform{rank}" / f"uniform{n}"
        if not path.exists():
            updates = {
                module: Factors(
                    torch.randn(rank, d_in, generator=generator) / d_in**0.5,
                    torch.randn(d_out, rank, generator=generator) * 0.01,
                )
                for module, (d_out, d_in) in linear_shapes(base.model).items()
            }
            write_adapter(path, updates, base.name, None, torch.bfloat16)
    return load_library([str(FOLDER / f"uniform{rank}")])


def peak_mib() -> int:
    """The process's highest resident memory, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _method(name: str, base: Base, adapters: list[Adapter], folder: str) -> Routed:
    method: Any = load_method(name)(name)
    method.settings = Settings(output_folder=Path(folder))
    method.attach(base, adapters)
    return method


def routed(size: str, every: str) -> dict[str, Any]:
    """A whole routed run but for loading, by stage."""
    base, adapters, asked = load_base(EMBEDDED), library(int(size)), queries(int(every))
    with tempfile.TemporaryDirectory() as folder:
        method = _method("proto_route", base, adapters, folder)
        seconds = timed(lambda: method.answer(asked))
    stages = {stage: round(value, 3) for stage, value in method.stages.seconds.items()}
    # Calibration is once for a library: where this process was the first to see it, it is not counted.
    return {
        "seconds": seconds - stages["calibrate"], "stages": stages, "peak_mib": peak_mib(),
        "variants": len(method.variants), "queries": len(asked), "tried": float(method.evidence.tried.mean()),
    }  # fmt: skip


def look(tokens: str) -> dict[str, Any]:
    """Whom long prompts go to when routing reads at most so many tokens of each; 0: all of them."""
    base, adapters = load_base(EMBEDDED), library(22)
    long = [q for q in queries() if len(encode(base.tokenizer, [q.input])[0]) > passes.LOOK][::2]
    passes.LOOK = int(tokens) or sys.maxsize  # of generic prompts too
    with tempfile.TemporaryDirectory() as folder:
        method = _method("proto_route", base, adapters, folder)
        weights: Any = []
        seconds = timed(lambda: weights.append(method.route(long)))
    seconds -= method.stages.seconds["calibrate"]  # the first of a length computes it
    return {"seconds": seconds, "heaviest": weights[0].argmax(1).tolist(), "queries": len(long)}


def _average(base: Base, folder: str) -> Any:
    """The base model with the mean of the library merged into its weights by PEFT."""
    method = _method("average", base, library(22), folder)
    method.answer(queries()[:1])
    context = live(base, Path(folder) / "variants" / "0")
    model = context.__enter__()  # stays so: the process ends with it
    model.merge_adapter()
    return model


def static(every: str) -> dict[str, Any]:
    """The same answers from one static average that is merged into the weights already."""
    base, asked = load_base(EMBEDDED), queries(int(every))
    with tempfile.TemporaryDirectory() as folder:
        model = _average(base, folder)
        seconds = timed(lambda: answer(model, base.tokenizer, asked))
    return {"seconds": seconds, "peak_mib": peak_mib(), "queries": len(asked)}


def kit(every: str) -> dict[str, Any]:
    """The same in the starter kit's way: one query at a time, every choice a full pass."""
    base, asked = load_base(EMBEDDED), queries(int(every))
    pad = base.tokenizer.pad_token_id

    def ask(query: Query, model: Any) -> None:
        (ids,) = encode(base.tokenizer, [query.input])
        if query.eval_type != MULTIPLE_CHOICE:
            row, wanted = torch.tensor([ids]), {"max_new_tokens": NEW_TOKENS, "do_sample": False}
            model.generate(input_ids=row, attention_mask=torch.ones_like(row), pad_token_id=pad, **wanted)
            return
        for choice in base.tokenizer(list(query.choices), add_special_tokens=False)["input_ids"]:
            row = torch.tensor([[*ids, *choice, base.tokenizer.eos_token_id]])
            model(input_ids=row).logits.log_softmax(-1)

    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        model = _average(base, folder)
        seconds = timed(lambda: [ask(query, model) for query in asked])
    return {"seconds": seconds, "peak_mib": peak_mib(), "queries": len(asked)}


def floor() -> dict[str, Any]:
    """Memory of the base model, one variant and its largest batches: what no run can do without."""
    base, asked = load_base(EMBEDDED), queries()
    with tempfile.TemporaryDirectory() as folder:
        adapter = load_library([str(LIBRARY)])[0]
        updates = dict(adapter.read_all())
        write_adapter(Path(folder) / "one", updates, base.name, None, base.model.dtype)
        longest = sorted(asked, key=lambda query: -len(query.input))
        chosen = [q for q in longest if q.eval_type == MULTIPLE_CHOICE][:8]
        with live(base, Path(folder) / "one") as model:
            answer(model, base.tokenizer, [*longest[:8], *chosen])
    return {"peak_mib": peak_mib()}


def decode(way: str) -> dict[str, Any]:
    """Tokens/s of 16 prompts of 32 tokens that write 64 each, with 8 adapters of one rank on all layers."""
    base = load_base(EMBEDDED)
    base.tokenizer.eos_token = "<file_sep>"  # of no use to the model: nothing ends early
    adapters = uniform(base)
    rows = encode(base.tokenizer, [query.input * 8 for query in queries()[:16]], 32)

    def write(model: Any) -> int:
        return sum(len(found.ids) for found in generate(model, base.tokenizer, rows, NEW_TOKENS))

    def measured(model: Any) -> dict[str, Any]:
        generate(model, base.tokenizer, rows, 2)  # warm
        tokens: list[int] = []
        return {"seconds": timed(lambda: tokens.append(write(model))), "tokens": tokens[0]}

    if way == "arrow":
        from peft import ArrowConfig
        from peft.tuners.lora.arrow import create_arrow_model

        paths = [str(adapter.folder.path) for adapter in adapters]
        model = create_arrow_model(base.model, paths, ArrowConfig(top_k=3), autocast_adapter_dtype=False)
        return measured(model.to(base.model.dtype).eval())
    if way in ("spectr", "lag"):
        method: Any = load_method(way)(way)
        method.settings = Settings()
        method.attach(base, adapters)
        with attached(base.model, load_experts(adapters, "cpu", base.model.dtype), method.weigh):
            return measured(base.model)
    with tempfile.TemporaryDirectory() as folder:
        updates = {
            module: weighted_sum([adapter.read(module) for adapter in adapters[:3]], [0.6, 0.3, 0.1])
            for module in linear_shapes(base.model)
        }
        write_adapter(Path(folder) / "v", updates, base.name, None, base.model.dtype)
        with live(base, Path(folder) / "v") as model:
            if way == "merged":
                model.merge_adapter()
            return measured(model)


def step(adapters: str, rows: str) -> dict[str, Any]:
    """A step in which each row writes a token, with so many adapters in the batch; 0: the base model alone.

    Several are PEFT's mixed batch. The base model alone is what a variant merged into the weights is.
    """
    from peft import PeftModel

    base, count, n_rows = load_base(EMBEDDED), int(adapters), int(rows)
    model: Any = base.model
    for n, adapter in enumerate(uniform(base)[:count]):
        path, how = str(adapter.folder.path), {"adapter_name": str(n), "autocast_adapter_dtype": False}
        if n:
            model.load_adapter(path, **how)
        else:
            model = PeftModel.from_pretrained(model, path, **how)
    ids = torch.full((n_rows, 1), 5)
    mixed = {"adapter_names": sorted(str(n % count) for n in range(n_rows))} if count > 1 else {}

    def work() -> None:
        with torch.inference_mode():
            model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids), **mixed)

    work()
    return {"seconds": median(timed(work) for _ in range(9))}


def merge(way: str, shape: str, rank: str) -> dict[str, Any]:
    """A mix of adapters as one of the given rank: exact sum and recompression, or PEFT's dense SVD.

    Args:
        way: `ours` or `peft`.
        shape: `embedded`, three of 8 uniform adapters on all layers, or `large`, 27 on one layer of
            14336 x 4096, as Mistral's down projection.
        rank: of the adapters and of the result.
    """
    r = int(rank)
    if shape == "large":
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
        work = lambda: [recompress(weighted_sum(found, weights), r) for found in parts.values()]  # noqa: E731
        work()
        return {"seconds": median(timed(work) for _ in range(5))}
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
    names = [str(n) for n in range(count)]
    return {
        "seconds": timed(
            lambda: model.add_weighted_adapter(names, weights, "sum", combination_type="svd", svd_rank=r)
        )
    }


def library_prototypes(size: str) -> dict[str, Any]:
    """Prototypes of a library, from nothing and from disk, and merely reading the adapters."""
    adapters = library(int(size))

    def read() -> list[Any]:
        return [list(adapter.read_all()) for adapter in adapters]

    read()  # all find the files in the system's cache
    with empty_cache():
        prototypes(adapters[:1])
    found = {"read": [timed(read) for _ in range(3)], "seconds": [], "cached": []}
    for _ in range(3):
        with empty_cache():
            for key in ("seconds", "cached"):
                found[key].append(timed(lambda: prototypes(adapters)))
    mib = sum((a.folder.path / WEIGHTS_FILE).stat().st_size for a in adapters) / 2**20
    return {**{key: min(values) for key, values in found.items()}, "mib": mib}


def rank(width: str) -> dict[str, Any]:
    """What grows with the rank, by 8 adapters on all layers: prototypes, a swap, a step of 11 rows."""
    base = load_base(EMBEDDED)
    adapters = uniform(base, int(width))
    with empty_cache():
        prototypes(adapters[:1], dtype=base.model.dtype)  # warm
    with empty_cache():
        made = timed(lambda: prototypes(adapters, dtype=base.model.dtype))
    ids = torch.full((11, 1), 5)
    swaps: dict[str, list[float]] = {"new": [], "hot": []}
    with Hotswap(base) as swap, torch.inference_mode():
        for adapter in adapters:
            swaps["hot"].append(timed(lambda path=adapter.folder.path: swap.show(path)))
        model = swap.show(adapters[0].folder.path)
        steps = [timed(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids))) for _ in range(10)]
        for adapter in adapters:
            swap.clear()
            swaps["new"].append(timed(lambda path=adapter.folder.path: swap.show(path)))
    return {
        "prototypes": made, "step": median(steps[1:]),
        **{key: median(found[1:]) for key, found in swaps.items()},
    }  # fmt: skip


def probing(count: str) -> dict[str, Any]:
    """The probe of so many queries, repeated where there are fewer, with the committed library."""
    base, adapters, asked = load_base(EMBEDDED), library(22), queries()
    rows = passes.look(encode(base.tokenizer, [query.input for query in asked]))
    rows = [rows[n % len(rows)] for n in range(int(count))]
    protos = prototypes(adapters, dtype=base.model.dtype)
    means = Calibration(base).means(list(protos))
    pad = base.tokenizer.pad_token_id
    probe(base.model, rows[:8], pad, protos, means, len(adapters))
    seconds = timed(lambda: probe(base.model, rows, pad, protos, means, len(adapters)))
    return {"seconds": seconds, "tokens": sum(map(len, rows))}


def gate(count: str, size: str) -> dict[str, Any]:
    """Gate and clusters on drawn responses of the shape that real ones have, without trials."""
    rng = np.random.default_rng(SEED)
    n, modules = int(size), 210
    level = rng.uniform(0.05, 0.2, (1, n, modules)).astype(np.float32)

    def drawn(rows: int) -> Any:
        noise = rng.standard_normal((rows, n, modules), dtype=np.float32)
        return level * np.exp(0.1 * noise)

    responses = drawn(int(count))
    responses[np.arange(int(count)), rng.integers(n, size=int(count))] *= 1.2  # one that stands out
    estimator = PrototypeGate().fit(drawn(64))

    def work() -> None:
        scores = estimator.decision_function(responses)
        estimator.in_question(scores), estimator.votes(responses, scores)
        weights = weights_of(estimator.candidate_scores(scores), estimator.temperature, estimator.top_k)
        cluster(weights, None, 0)

    return {"seconds": timed(work)}


def matmul_share(every: str) -> dict[str, Any]:
    """What prediction with one live variant spends its time on, by operator, from torch's profiler."""
    base, asked = load_base(EMBEDDED), queries(int(every))
    with tempfile.TemporaryDirectory() as folder:
        adapter = next(a for a in load_library([str(LIBRARY)]) if a.name == "chain_sum")
        write_adapter(Path(folder) / "one", dict(adapter.read_all()), base.name, None, base.model.dtype)
        with live(base, Path(folder) / "one") as model, profile(activities=[ProfilerActivity.CPU]) as seen:
            answer(model, base.tokenizer, asked)
    events = {event.key: event.self_cpu_time_total / 1e6 for event in seen.key_averages()}
    return {"seconds": sum(events.values()), "operators": _largest(events)}


def _largest(events: dict[str, float]) -> dict[str, float]:
    return dict(sorted(((k, round(v, 3)) for k, v in events.items()), key=lambda x: -x[1])[:14])


def roofline() -> dict[str, Any]:
    """The machine's GEMM and memory speed, and what a pass over prompts and a step of writing reach."""
    base = load_base(EMBEDDED)
    model, dtype = base.model, base.model.dtype
    a, w = torch.randn(512, 576).to(dtype), torch.randn(1536, 576).to(dtype)
    gemm = _rate(lambda: torch.nn.functional.linear(a, w), 2 * 512 * 576 * 1536)
    block = torch.randn(64 << 20)
    bandwidth = _rate(lambda: block.sum(), block.numel() * 4)
    linear = sum(d_out * d_in for d_out, d_in in linear_shapes(model).values())
    rows = encode(base.tokenizer, [query.input for query in queries(8)], 128)

    def read() -> None:
        with torch.inference_mode():
            for _, ids, mask in batches(model, rows, base.tokenizer.pad_token_id, None):
                forward(model, ids, mask)

    read()
    tokens = sum(map(len, rows))
    return {
        "gemm_flops": gemm, "bytes": bandwidth, "linear": linear,
        "head": model.get_output_embeddings().weight.numel(), "read_tokens": tokens / timed(read),
    }  # fmt: skip


def _rate(work: Callable[[], Any], amount: float) -> float:
    work()
    return max(amount * 5 / timed(lambda: [work() for _ in range(5)]) for _ in range(5))


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    f.__name__: f
    for f in (
        routed, static, kit, floor, decode, step, merge, library_prototypes, gate, matmul_share, roofline,
        look, rank, probing,
    )
}  # fmt: skip


def run(words: Sequence[str]) -> dict[str, Any]:
    """One measurement by its name and arguments."""
    return MEASURES[words[0]](*words[1:])
