"""From measurements to the tables of docs/speed.md: medians, ranges, met or missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from scripts.bench import runner
from scripts.bench.markdown import header, insert, row
from scripts.bench.speed import shape

Known = dict[str, list[dict[str, Any]]]  # by measurement, one entry a repetition
FOLDER = Path("output/benchmark/speed")
PAGE = Path("docs/speed.md")
SIZES = ("4", "16", "64", "256")  # of libraries
ALL, EIGHTH = "1", "8"  # every so many queries
SHAPE = (f"shape {shape.FEW}", f"shape {shape.MANY}")
TOKENS = 86905  # of its prompts, by the embedded base model's tokenizer
# An RTX A6000, by NVIDIA's data sheet: dense bfloat16 rate and memory bandwidth.
A6000_FLOPS, A6000_BYTES = 154.8e12, 768e9


class Measured(NamedTuple):
    """One line: a figure with its range, and whether it is what was aimed at."""

    what: str
    against: str
    target: str
    value: float
    low: float
    high: float
    met: bool
    unit: str = "x"

    def row(self) -> str:
        """The line of a Markdown table."""
        digits = 0 if self.value >= 100 else 2
        spread = "" if self.low == self.high else f" ({self.low:.{digits}f} to {self.high:.{digits}f})"
        value = f"{self.value:.{digits}f}{self.unit}{spread}"
        return row(self.what, self.against, self.target, value, "met" if self.met else "missed")


def known() -> Known:
    """All measurements that are done, each with its number of repetition, in order."""
    found: Known = {}
    for (*words, number), one in runner.kept(FOLDER):
        found.setdefault(" ".join(words), []).append(one | {"repetition": int(number)})
    return {job: sorted(ones, key=lambda one: int(one["repetition"])) for job, ones in found.items()}


def together(known: Known, job: str, other: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The repetitions that both measurements have, which took turns."""
    theirs = {one["repetition"]: one for one in known[other]}
    return [(one, theirs[one["repetition"]]) for one in known[job] if one["repetition"] in theirs]


def values(known: Known, job: str, key: str = "seconds") -> list[float]:
    """One number of every repetition; of a stage where the key is `stages.NAME`."""
    first, _, second = key.partition(".")
    return [found[first][second] if second else found[first] for found in known[job]]


def middle(known: Known, job: str, key: str = "seconds") -> float:
    """The median over repetitions."""
    return median(values(known, job, key))


def ratio(
    known: Known, job: str, other: str, what: str, against: str, target: str, limit: float,
    least: bool = False, factor: float = 1.0, key: str = "seconds",
) -> Measured:  # fmt: skip
    """`job` over `other`, repetition by repetition, times a factor; at most the limit, or at least."""
    found = [factor * one[key] / two[key] for one, two in together(known, job, other)]
    value = median(found)
    met = value >= limit if least else value <= limit
    return Measured(what, against, target, value, min(found), max(found), met)


def targets(known: Known) -> Iterator[Measured]:
    """Every line of the table of targets whose measurements are there."""
    for lines in (
        _runs,
        _demo,
        _probing,
        _writing,
        _merges,
        _prototypes,
        _gate,
        _memory,
        _growth,
        _products,
        _same,
    ):
        try:
            yield from list(lines(known))
        except KeyError:
            continue


def _runs(known: Known) -> Iterator[Measured]:
    whole, kit = f"routed 22 {ALL}", f"kit {EIGHTH}"
    yield ratio(
        known, whole, f"static {ALL}", f"whole routed run, {known[whole][0]['queries']} queries",
        "one static average, merged", "at most 1.5x", 1.5,
    )  # fmt: skip
    scale = known[whole][0]["queries"] / known[kit][0]["queries"]
    yield ratio(
        known, kit, whole, "whole routed run", "the kit's way, every 8th query", "at least 5x faster",
        5, True, scale,
    )  # fmt: skip


def _demo(known: Known) -> Iterator[Measured]:
    found = values(known, "demo all")
    yield Measured(
        "the demo, 306 queries, nothing cached", "a limit, start to end", "at most 60 s", median(found),
        min(found), max(found), median(found) <= 60, " s",
    )  # fmt: skip


def _probing(known: Known) -> Iterator[Measured]:
    found = known["probing 100"][0]["ratios"]
    yield Measured(
        "probe", "a pass of the base model", "at most 1.2x", median(found), min(found), max(found),
        median(found) <= 1.2,
    )  # fmt: skip


def _writing(known: Known) -> Iterator[Measured]:
    for way, name, times in (
        ("arrow", "PEFT's Arrow", 3), ("spectr", "SpectR (ours)", 1.7), ("lag", "LAG (ours)", 1.7)
    ):  # fmt: skip
        yield ratio(
            known, f"decode {way}", "decode merged", "tokens/s when writing, a variant", name,
            f"at least {times}x", times, True,
        )  # fmt: skip


def _merges(known: Known) -> Iterator[Measured]:
    for kind, name, times in (
        ("embedded", "the embedded base, 3 adapters", 100),
        ("large", "a 4096 x 14336 module, 27 adapters", 300),
    ):
        yield ratio(
            known, f"merge peft {kind} 16", f"merge ours {kind} 16", f"merge and recompression, {name}",
            "`add_weighted_adapter`, svd", f"at least {times}x", times, True,
        )  # fmt: skip


def _prototypes(known: Known) -> Iterator[Measured]:
    for size in ("22", "256"):
        if f"library_prototypes {size}" not in known:
            continue
        for key, where, limit in (("seconds", "nothing cached", 5.0), ("cached", "from disk", 1.2)):
            job = f"library_prototypes {size}"
            found = [one[key] / one["read"] for one in known[job]]
            yield Measured(
                f"prototypes of {size} adapters, {where}", "reading the adapters", f"at most {limit:g}x",
                median(found), min(found), max(found), median(found) <= limit,
            )  # fmt: skip


def _gate(known: Known) -> Iterator[Measured]:
    growth = f"routed 256 {EIGHTH}"
    probe = middle(known, growth, "stages.probe") * 3200 / known[growth][0]["queries"]
    shares = [100 * seconds / probe for seconds in values(known, "gate 3200 256")]
    yield Measured(
        "gate and clusters, 3,200 queries, 256 adapters",
        f"their probe, scaled from {known[growth][0]['queries']} queries",
        "at most 5 %", median(shares), min(shares), max(shares), median(shares) <= 5, " %",
    )  # fmt: skip


def _memory(known: Known) -> Iterator[Measured]:
    yield ratio(
        known, f"routed 22 {ALL}", "floor", "peak memory", "base, a variant and a batch", "at most 1.3x",
        1.3, key="peak_mib",
    )  # fmt: skip


def _growth(known: Known) -> Iterator[Measured]:
    yield ratio(
        known, f"routed 256 {EIGHTH}", f"routed 4 {EIGHTH}", "peak memory, 256 adapters", "4 adapters",
        "at most 1.05x", 1.05, key="peak_mib",
    )  # fmt: skip
    # With what calibration takes where it is on disk already: the search for duplicates among the adapters.
    # The first run of a size may have measured the calibration itself.
    pairs = together(known, f"routed 256 {EIGHTH}", f"routed 16 {EIGHTH}")
    large, small = (_with_lookup([pair[n] for pair in pairs]) for n in (0, 1))
    grown = [one / two for one, two in zip(large, small, strict=True)]
    yield Measured(
        "whole run, 256 adapters", "16 adapters", "at most 1.25x", median(grown), min(grown), max(grown),
        median(grown) <= 1.25,
    )  # fmt: skip


def _products(known: Known) -> Iterator[Measured]:
    share = 100 * matmuls(known)["matrix products"]
    yield Measured(
        "matrix products", "prediction, torch's profiler", "at least 85 %", share, share, share, share >= 85,
        " %",
    )  # fmt: skip


def _same(known: Known) -> Iterator[Measured]:
    differ, asked = known[f"same {EIGHTH}"][0]["differ"], known[f"same {EIGHTH}"][0]["queries"]
    yield Measured(
        "answers that differ, an adapter added to the weights", "beside them", "none", differ, differ,
        differ, not differ, f" of {asked}",
    )  # fmt: skip


def _with_lookup(found: list[dict[str, Any]]) -> list[float]:
    """Seconds of whole runs of one library, the calibration that is looked up counted."""
    looked_up = min(run["stages"]["calibrate"] for run in found)
    return [run["seconds"] + looked_up for run in found]


KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn"),
    "attention": ("attention", "softmax"),
}


def matmuls(known: Known) -> dict[str, float]:
    """Shares of the time of prediction, largest first."""
    found = known[f"matmul_share {EIGHTH}"][0]
    shares: dict[str, float] = {}
    for name, seconds in found["operators"].items():
        kind = next((kind for kind, names in KINDS.items() if any(part in name for part in names)), name)
        shares[kind] = shares.get(kind, 0.0) + seconds / found["seconds"]
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def write(*names: str) -> None:
    """Writes these tables, or all, if all of a table is measured; of the targets those that are."""
    found = known()
    tables: dict[str, Callable[[], list[str]]] = {
        "speed": lambda: [*_targets_table(found), *_roofline(found)], "stages": lambda: _stages(found),
        "truncation": lambda: _truncation(found), "mistral": lambda: _mistral(found),
    }  # fmt: skip
    for name in names or tables:
        try:
            insert(PAGE, name, tables[name]())
        except KeyError as error:
            print(f"no table {name} yet: {error} is not measured")


def _targets_table(known: Known) -> list[str]:
    names = ["measured", "against", "target", "median (range)", ""]
    return [*header(names, texts=5), *(found.row() for found in targets(known))]


def _roofline(known: Known) -> list[str]:
    """What the machine could do, below the targets; nothing where it is not measured."""
    if not {"roofline", "decode merged"} <= known.keys():
        return []
    roof = known["roofline"][0]
    flops, memory = middle(known, "roofline", "gemm_flops"), middle(known, "roofline", "bytes")
    read = middle(known, "roofline", "read_tokens")
    at_most = flops / (2 * roof["linear"])
    written = known["decode merged"][0]["tokens"] / middle(known, "decode merged")
    # A step reads all weights once and multiplies them with 16 rows; whichever takes longer.
    weights = roof["linear"] + roof["head"]
    step = max(roof["itemsize"] * weights / memory, 2 * 16 * weights / flops)
    text = (
        f"Roofline: this machine multiplies {flops / 1e9:.0f} GFLOP/s in {roof['dtype']} and reads "
        f"{memory / 1e9:.0f} GB/s. That allows {at_most:.0f} prompt tokens/s, and {read:.0f} were reached "
        f"({100 * read / at_most:.0f} %); and {16 / step:.0f} written tokens/s in a batch of 16, of which "
        f"{written:.0f} were reached ({100 * written * step / 16:.0f} %)."
    )
    return ["", text]


def _stages(known: Known) -> list[str]:
    names = list(known[f"routed 22 {ALL}"][0]["stages"])
    lines = header(["adapters", "queries", *names, "sum", "number of variants", "peak MiB"], texts=0)
    for job in sorted((j for j in known if j.startswith("routed")), key=lambda j: int(j.split()[1])):
        last, peak = known[job][-1], f"{middle(known, job, 'peak_mib'):.0f}"
        cells = [f"{middle(known, job, f'stages.{name}'):.1f}" for name in names]
        total = f"{middle(known, job):.1f}"
        lines.append(row(job.split()[1], last["queries"], *cells, total, last["variants"], peak))
    static = f"static {ALL}"
    seconds, peak = f"{middle(known, static):.1f}", f"{middle(known, static, 'peak_mib'):.0f}"
    blanks = [""] * (len(names) - 1)  # all that it does is predict
    queries = known[static][0]["queries"]
    return [*lines, row("one average", queries, *blanks, seconds, seconds, 1, peak)]


def _truncation(known: Known) -> list[str]:
    whole = known["truncation 0"][0]
    lines = header(["tokens read, at most", "the same top candidate"], texts=0)
    for tokens in ("128", "256", "512", "0"):
        found = known[f"truncation {tokens}"][0]
        same = sum(a == b for a, b in zip(found["top"], whole["top"], strict=True))
        name = tokens if tokens != "0" else "all"
        lines.append(row(name, f"{same} of {whole['queries']}"))
    return lines


def _mistral(known: Known) -> list[str]:
    few, many = SHAPE
    flops, memory = middle(known, many, "gemm_flops"), middle(known, many, "bytes")

    def layer(key: str) -> float:
        return (middle(known, many, key) - middle(known, few, key)) / (shape.MANY - shape.FEW)

    def whole(key: str) -> float:
        return middle(known, few, key) + (shape.LAYERS - shape.FEW) * layer(key)

    head = known[few][0]["head"]
    weights = layer("linear") * shape.LAYERS + head
    routed, variants, answers, steps = 51325, 24, 350, 64  # routed: tokens of the prompts
    cpu, products, reads = 1.0, A6000_FLOPS / flops, A6000_BYTES / memory  # how much faster the card is
    plan = (
        ("prototypes", f"{shape.ADAPTERS} adapters of rank {shape.RANK} on all layers, on the CPU in both",
         whole("prototypes"), cpu),
        ("probe", f"{routed} tokens, at most 128 a query", routed * whole("probe"), products),
        ("variants", f"{variants}, three adapters each, on the CPU in both",
         variants * whole("variant"), cpu),
        ("reading the prompts", f"{TOKENS} tokens", TOKENS * whole("read"), products),
        ("writing", f"{answers} answers of {steps} tokens, {shape.WRITING} at a time; bound by memory",
         answers / shape.WRITING * steps * whole("write"), reads),
    )  # fmt: skip
    here = sum(seconds for _, _, seconds, _ in plan)
    card = sum(seconds / faster for _, _, seconds, faster in plan)
    cache = 2 * shape.LAYERS * 8 * 128 * 2 * 4096 / 2**30
    protos = 2 * shape.ADAPTERS * shape.RANK * (6 * 4096 + 14336) * shape.LAYERS / 2**30
    return [
        *header(["step", "assumed", "this machine, s", "an A6000, s"], texts=2),
        *(row(name, how, f"{seconds:.0f}", f"{seconds / faster:.0f}") for name, how, seconds, faster in plan),
        row("sum", "", f"{here:.0f}", f"{card:.0f} of 3600"),
        "",
        f"Memory, by arithmetic: weights {2 * (weights + head) / 2**30:.1f} GiB, the cache of a batch "
        f"of 4,096 tokens {cache:.1f} GiB, prototypes of the library {protos:.1f} GiB; of 48 GB.",
    ]
