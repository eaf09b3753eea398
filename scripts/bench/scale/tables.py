"""From measurements to the tables of docs/scale.md: figures, growth, met or missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bench import runner
from scripts.bench.markdown import header, insert, row
from scripts.bench.runner import Cell

FOLDER = Path("output/benchmark/scale")
PAGE = Path("docs/scale.md")
SIZES = (16, 64, 256, 1_000, 10_000)  # adapters
COUNTS = (1_000, 10_000, 100_000, 1_000_000)  # queries
ROOM = 15e9  # bytes that a cell may take
CELLS = 3e7  # most numbers in a routing table of which a report is made, for the sake of minutes
# What a billion queries would take: by whom, cores or cards, and the rate that each reaches. A card's is 40 %
# of an H100's dense bfloat16 rate by NVIDIA's data sheet, 989 TFLOP/s; a core's is measured.
CARD = 0.4 * 989e12
WHO = (("one machine, 64 cores", 64, None), ("one card", 1, CARD), ("one machine, eight cards", 8, CARD),
       ("a cluster, 64 machines of eight", 512, CARD))  # fmt: skip
ADAPTERS, QUERIES = 1_000, 1e9
READ, WHOLE, WRITTEN = 64, 108, 16  # tokens of a prompt that routing reads, of all of it, of an answer
# Parameters of the blocks, all parameters, and numbers in an adapter's prototypes: the embedded model with
# the mean of the committed adapters, Mistral-7B with rank 16 on all linear layers.
MODELS = (
    ("SmolLM2-135M", 106.2e6, 134.5e6, 57.48 * 2**20 / 4 / 22),
    ("Mistral-7B", 6.98e9, 7.24e9, 16 * 32 * (6 * 4096 + 14336)),
)
STEPS = ("open", "prototypes", "prototypes, kept", "calibrate", "duplicates", "fit", "probe", "gate")
Known = dict[Cell, dict[str, Any]]


def cells() -> Iterator[Cell]:
    """All cells, in an order in which those that write come before those that read."""
    yield ("written", str(SIZES[-1]))
    for size in SIZES:
        yield from ((what, str(size)) for what in ("gate", "library", "planned"))
    yield ("factor", "512")
    for count in COUNTS:
        for size in SIZES:
            yield from ((what, str(size), str(count)) for what in ("clusters", "report"))


def skipped(cell: Cell) -> str:
    """Why a cell is not measured; empty if it is."""
    if len(cell) < 3:
        return ""
    size, count = map(int, cell[1:])
    numbers = size * count
    need = numbers * 8 * (2 if cell[0] == "clusters" else 4)
    if need > ROOM:
        return f"{need / 1e9:,.0f} GB"
    if cell[0] == "report" and numbers > CELLS:
        return f"{numbers / 1e6:,.0f} million cells"
    return ""


def growth(sizes: list[float], values: list[float]) -> float:
    """The exponent p of `value = c * size ** p`, by least squares on logarithms.

    Example:
        >>> round(growth([1, 10, 100], [3, 30, 300]), 6)
        1.0
    """
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def write() -> None:
    """Prints every table whose measurements are all there, and puts it into docs/scale.md."""
    known: Known = dict(runner.kept(FOLDER))
    tables: dict[str, Callable[[Known], list[str]]] = {
        "targets": _targets, "gate": _gate, "library": _library, "queries": _queries,
        "factor": _factor, "takes": _takes,
    }  # fmt: skip
    for name, make in tables.items():
        try:
            lines = make(known)
        except KeyError as error:
            print(f"no table {name} yet: {error} is not measured")
            continue
        print("", *lines, sep="\n")
        insert(PAGE, name, lines)


def _exponent(values: list[float], first: int = 0) -> str:
    """The exponent over the sizes from one on."""
    return f"{growth(list(map(float, SIZES))[first:], values[first:]):.2f}"


def _gate(known: Known) -> list[str]:
    lines = header(["adapters", *(f"{size:,}" for size in SIZES), "exponent"])
    found = [known["gate", str(size)] for size in SIZES]
    for key, name, digits in (
        ("ms", "gate, ms a query", 2), ("fit", "fit, s", 1), ("peak_mib", "peak memory, MiB", 0)
    ):  # fmt: skip
        values = [one[key] for one in found]
        lines.append(row(name, *(f"{value:,.{digits}f}" for value in values), _exponent(values)))
    for key, name in (("recall", "best adapter on the shortlist"), ("same", "same top candidate")):
        lines.append(row(name, *(f"{one[key]:.4f}" if one else "" for one in found), ""))
    return lines


def _factor(known: Known) -> list[str]:
    one = known["factor", "512"]
    return [
        f"Of {one['queries']} queries and 512 adapters, the top candidate is that of a gate in which all",
        f"adapters tell the common factor for a share of {one['same']:.3f}.",
    ]


def _library(known: Known) -> list[str]:
    found = [known["library", str(size)] for size in SIZES]
    lines = header(["adapters", *(f"{size:,}" for size in SIZES), "exponent"])
    for step in STEPS:
        values = [one["seconds"][step] for one in found]
        lines.append(row(f"{step}, s", *(f"{value:,.2f}" for value in values), _exponent(values, 2)))
    lines.append(row("copies found", *(f"{one['duplicates']:.4f}" for one in found), ""))
    peaks = [one["peak_mib"] for one in found]
    plans = [known["planned", str(size)]["peak_mib"] for size in SIZES]
    for name, values in (
        ("prototypes, MiB", [one["prototypes_mib"] for one in found]),
        ("peak memory, MiB", peaks), ("--plan says, MiB", plans),
    ):  # fmt: skip
        lines.append(row(name, *(f"{value:,.0f}" for value in values), _exponent(values, 2)))
    return lines


def _queries(known: Known) -> list[str]:
    lines = header(["", "adapters", *(f"{count:,} queries" for count in COUNTS), "exponent"])
    for what in ("clusters", "report"):
        for size in SIZES:
            told, seconds, counts = [], [], []
            for count in COUNTS:
                cell = (what, str(size), str(count))
                if reason := skipped(cell):
                    told.append(f"skipped: {reason}")
                    continue
                one = known[cell]
                more = (
                    f"{one['variants']} variants, loss {one['loss']:.3f}, at most {one['worst']:.2f}"
                    if what == "clusters" else f"page {one['megabytes']:.1f} MB"
                )  # fmt: skip
                told.append(f"{one['seconds']:.1f} s, {one['peak_mib']:,} MiB, {more}")
                seconds.append(one["seconds"])
                counts.append(float(count))
            power = f"{growth(counts, seconds):.2f}" if len(counts) > 1 else ""
            lines.append(row(what, f"{size:,}", *told, power))
    return lines


def _targets(known: Known) -> list[str]:
    small, thousand, most = (known["gate", size] for size in ("16", "1000", "10000"))
    plan, taken = known["planned", "10000"]["peak_mib"], known["library", "10000"]["peak_mib"]
    times = thousand["ms"] / small["ms"]
    lines = header(["measured", "target", "found", ""], texts=4)
    for what, target, value, met in (
        ("gate, 1,000 adapters against 16", "at most 4x", f"{times:.1f}x", times <= 4),
        ("gate, 1,000 adapters", "under 1 ms a query", f"{thousand['ms']:.2f} ms", thousand["ms"] < 1),
        ("gate, 10,000 adapters", "under 4 ms a query", f"{most['ms']:.2f} ms", most["ms"] < 4),
        ("recall of the shortlist, 10,000 adapters", "at least 0.999", f"{most['recall']:.4f}",
         most["recall"] >= 0.999),
        ("memory, 10,000 adapters of one layer", f"at most the {plan:,} MiB of --plan", f"{taken:,} MiB",
         taken <= plan),
    ):  # fmt: skip
        lines.append(row(what, target, value, "met" if met else "missed"))
    return lines


def _takes(known: Known) -> list[str]:
    """Days for a billion queries and a thousand adapters, by arithmetic from measured and assumed rates."""
    one = known["library", "16"]  # whose prototypes are next to nothing
    core = one["tokens"] * 2 * MODELS[0][1] / one["seconds"]["probe"]  # FLOP/s
    gate = known["gate", "1000"]["ms"] / 1000
    lines = header(["who", *(f"{name}, {part}" for name, *_ in MODELS for part in ("routing", "answers"))])
    for who, count, card in WHO:
        hours = [
            QUERIES * 2 * work / (count * (card or core)) / 3600
            for _, blocks, _, own in MODELS
            for work in (READ * (blocks + ADAPTERS * own), (WHOLE + WRITTEN) * blocks)
        ]
        lines.append(row(who, *(f"{h / 24:,.0f} days" if h >= 48 else f"{h:,.1f} h" for h in hours)))
    memory = [2 * (parameters + ADAPTERS * own) / 2**30 for _, _, parameters, own in MODELS]
    dense = QUERIES * (ADAPTERS + 1)
    return [
        *lines, "",
        f"A core reached {core / 1e9:.0f} GFLOP/s in the probe.",
        f"The gate takes {1000 * gate:.2f} ms for a query, {QUERIES * gate / 3600:,.0f} core hours.",
        f"Base model and prototypes together take {memory[0]:.1f} GiB on every card with SmolLM2-135M, and "
        f"{memory[1]:.1f} GiB with Mistral-7B, in bfloat16.",
        f"Weights and evidence as they are kept now would take {16 * dense / 1e12:.0f} TB.",
    ]  # fmt: skip
