"""What large libraries cost, and how fast that grows: `python -m scripts.bench.scale`.

Writes three tables of docs/scale.md: the gate with up to 10,000 adapters, whole runs with libraries that
change one layer, and the grouping of many queries. Every cell runs in a process of its own and is kept in a
file under output/benchmark/scale; delete it to measure it anew.

Passes with 10,000 adapters take seconds a query, so the gate's responses are resampled. Those of the
committed library to generic text and to data/test.csv are real. A further adapter has a real one as its
parent: the same means and deviations, and for each text a share of the parent's response, from 0.3 to 0.95,
beside the parent's response to another text. So there are families of close and of distant relatives. A
further query is mostly a real one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from merge.factors import Factors
from merge.folders import write_adapter
from router.constants import LIBRARY
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import EMBEDDED, linear_shapes, load_base
from router.model.passes import truncated
from router.queries.submission import COLUMNS, read_queries, write_table
from router.routing.calibration import Calibration
from router.routing.clusters import cluster
from router.routing.large import gate_for
from router.routing.probe import probe
from router.routing.prototypes import prototypes
from router.system.stages import peak_mib
from scripts.bench import runner
from scripts.bench.libraries import FOLDER as LIBRARIES
from scripts.bench.markdown import header, insert, row
from scripts.bench.runner import Cell

FOLDER = Path("output/benchmark/scale")
PAGE = Path("docs/scale.md")
QUERIES = Path("data/test.csv")
SIZES = (16, 64, 256, 1_000, 10_000)  # adapters
COUNTS = (1_000, 10_000, 100_000)  # queries that are grouped
GROUPED = (16, 256, 1_000)  # adapters, of those
SEED = 6
BLOCK = 256  # adapters that are resampled at a time
OWN = 0.95  # of a further query: the share of the real one
LOW, HIGH = 0.3, 0.95  # of a further adapter: the share of its parent
NUMBERS = 1 << 25  # responses in memory
JUDGED = 1_000  # queries for which shortlists are judged
ASKED, RANK = 64, 4  # queries of whole runs, and the rank of their adapters
STAGES = ("load", "prototypes", "calibrate", "probe", "gate", "clusters")
Found = dict[str, Any]
Known = dict[Cell, Found]
Responses = NDArray[np.float32]


def real() -> tuple[Responses, Responses]:
    """Log responses of the committed library to generic text and to queries, (texts, 22, modules, 2)."""
    file = LIBRARIES / "responses.safetensors"
    if not file.exists():
        base, adapters = load_base(EMBEDDED), load_library([str(LIBRARY)])
        texts = dict.fromkeys(query.input for query in read_queries(QUERIES))
        rows, pad = truncated(encode(base.tokenizer, list(texts))), base.tokenizer.pad_token_id
        protos, calibration = prototypes(adapters, dtype=base.model.dtype), Calibration(base)
        means = calibration.means(list(protos))
        reference = calibration.responses(adapters, protos, means)
        found = probe(base.model, rows, pad, protos, means, len(adapters)).responses
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"reference": reference, "queries": found}, file)
    arrays = load_file(file)
    reference, found = (np.log(arrays[name].clip(1e-6)) for name in ("reference", "queries"))
    return reference, found


class Library:
    """So many adapters, of which the first are real."""

    def __init__(self, size: int) -> None:
        reference, queries = real()
        self.mean, self.std = reference.mean(0), reference.std(0, ddof=1)
        self.z = [((of - self.mean) / self.std).astype(np.float32) for of in (reference, queries)]
        rng = np.random.default_rng(SEED)
        self.size, self.parents = size, np.arange(size) % len(self.mean)
        self.shares = np.where(np.arange(size) < len(self.mean), 1, rng.uniform(LOW, HIGH, size))
        self.steps = rng.integers(1, 10_000, size)  # which other text an adapter hears beside each

    def reference(self) -> Responses:
        """Responses to generic text, (texts, adapters, modules, 2)."""
        return self._heard(self.z[0], self.z[0], np.arange(len(self.z[0])))

    def queries(self, count: int, seed: int) -> Responses:
        """Responses to so many queries, (queries, adapters, modules, 2)."""
        texts = self.z[1]
        one, other = np.random.default_rng([SEED, seed]).integers(len(texts), size=(2, count))
        return self._heard(OWN * texts[one] + np.float32(np.sqrt(1 - OWN**2)) * texts[other], texts, one)

    def _heard(self, z: Responses, texts: Responses, numbers: NDArray[np.int64]) -> Responses:
        """Responses to texts that are mostly the real ones of these numbers."""
        out = np.empty((len(z), self.size, *z.shape[2:]), np.float32)
        for start in range(0, self.size, BLOCK):
            part = slice(start, start + BLOCK)
            parents, shares = self.parents[part], self.shares[part, None, None].astype(np.float32)
            others = (numbers[:, None] + 1 + self.steps[part] % (len(texts) - 1)) % len(texts)
            mixed = shares * z[:, parents] + np.sqrt(1 - shares**2) * texts[others, parents]
            np.exp(self.mean[parents] + self.std[parents] * mixed, out=out[:, part])
        return out


def _spent(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of processor time of one call, and what it returned."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


def gate(size: int) -> Found:
    """The gate: its fit, the weights of a query, and whether its shortlist holds the best adapter."""
    drawn = Library(size)
    reference = drawn.reference()
    fit, estimator = _spent(partial(gate_for(size).fit, reference))
    some = max(1, min(JUDGED, NUMBERS // reference[0].size))
    del reference
    times: list[float] = []
    listed: list[bool] = []
    for seed in range(-(-JUDGED // some)):
        responses = drawn.queries(some, seed)
        times.append(_spent(partial(estimator.predict_proba, responses))[0] / some)
        scores = estimator.decision_function(responses)
        with patch("router.routing.large.SHORT", size):
            best = estimator.decision_function(responses).argmax(1)
        listed += np.isfinite(scores[np.arange(some), best]).tolist()
    return {
        "ms": 1000 * float(np.median(times)), "fit": fit, "peak_mib": peak_mib(),
        "recall": float(np.mean(listed)),
    }  # fmt: skip


def library(size: int) -> Found:
    """A run with seeded random adapters of the last layer's modules, nothing cached."""
    base = load_base(EMBEDDED)
    shapes = {m: shape for m, shape in linear_shapes(base.model).items() if ".layers.29." in m}
    with tempfile.TemporaryDirectory() as folder:
        for n in range(size):
            generator = torch.Generator().manual_seed(SEED + n)
            updates = {
                m: Factors(
                    torch.randn(RANK, d_in, generator=generator) / d_in**0.5,
                    torch.randn(d_out, RANK, generator=generator) * 0.01,
                )
                for m, (d_out, d_in) in shapes.items()
            }
            write_adapter(Path(folder) / "library" / f"{n:05}", updates, base.name, None, torch.bfloat16)
        asked, file = read_queries(QUERIES)[:ASKED], Path(folder) / "queries.csv"
        write_table(file, COLUMNS, ((q.id, q.input, q.eval_type, list(q.choices) or "") for q in asked))
        words = ["-m", "proto_route", "--dataset_filepaths", str(file), "--max_gen_len", "1"]
        return runner.run(*words, "--adapters", f"{folder}/library", cache=f"{folder}/cache")


def clusters(size: int, count: int) -> Found:
    """Groups of queries: a third are the base model's, a tenth share two adapters, few are popular."""
    rng = np.random.default_rng(SEED)
    popular = 1 / np.arange(1, size + 1)
    best = rng.choice(size, count, p=popular / popular.sum())
    best[rng.random(count) < 1 / 3] = size
    weights, rows = np.zeros((count, size + 1)), np.arange(count)
    weights[rows, best] = rng.uniform(0.5, 1, count)
    shared = rng.random(count) < 0.1
    weights[rows[shared], best[shared]] = 0.45
    weights[rows, (best + 1) % size] += np.where(shared, 0.45, 0.3 * (1 - weights[rows, best]))
    weights[:, -1] += 1 - weights.sum(1)
    seconds, found = _spent(lambda: cluster(weights, None, 0))
    return {"seconds": seconds, "peak_mib": peak_mib(), "variants": len(found.weights)}


MEASURES: dict[str, Callable[..., Found]] = {"gate": gate, "library": library, "clusters": clusters}


def cells() -> list[Cell]:
    """All that is measured."""
    sizes = [(what, str(size)) for size in SIZES for what in ("gate", "library")]
    return [*sizes, *(("clusters", str(size), str(count)) for size in GROUPED for count in COUNTS)]


def growth(sizes: list[float], values: list[float]) -> float:
    """The exponent p of `value = c * size ** p`, by least squares on logarithms.

    Example:
        >>> round(growth([1, 10, 100], [3, 30, 300]), 6)
        1.0
    """
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-3)), 1)[0])


def _by_size(known: Known, what: str, rows: dict[str, tuple[Callable[[Found], float], int]]) -> list[str]:
    """A row for each figure, a column for each size, and the exponent from 256 adapters on."""
    lines = header(["adapters", *(f"{size:,}" for size in SIZES), "exponent"])
    for name, (figure, digits) in rows.items():
        values = [figure(known[what, str(size)]) for size in SIZES]
        grown = f"{growth([float(size) for size in SIZES[2:]], values[2:]):.2f}"
        lines.append(row(name, *(f"{value:,.{digits}f}" for value in values), grown))
    return lines


def _gate(known: Known) -> list[str]:
    rows: dict[str, tuple[Callable[[Found], float], int]] = {
        "gate, ms a query": (lambda one: one["ms"], 2), "fit, s": (lambda one: one["fit"], 1),
        "peak memory, MiB": (lambda one: one["peak_mib"], 0),
        "best adapter on the shortlist": (lambda one: one["recall"], 4),
    }  # fmt: skip
    return _by_size(known, "gate", rows)


def _library(known: Known) -> list[str]:
    def seconds(stage: str) -> Callable[[Found], float]:
        return lambda one: one["stages"].get(stage, 0.0)

    rows = {f"{stage}, s": (seconds(stage), 2) for stage in STAGES}
    return _by_size(known, "library", rows | {"peak memory, MiB": (lambda one: one["peak_mib"], 0)})


def _queries(known: Known) -> list[str]:
    lines = header(["adapters", *(f"{count:,} queries" for count in COUNTS), "exponent"])
    for size in GROUPED:
        ones = [known["clusters", str(size), str(count)] for count in COUNTS]
        grown = f"{growth([float(count) for count in COUNTS], [one['seconds'] for one in ones]):.2f}"
        told = (f"{one['seconds']:.1f} s, {one['peak_mib']:,} MiB, {one['variants']} groups" for one in ones)
        lines.append(row(f"{size:,}", *told, grown))
    return lines


def write() -> None:
    """Prints every table whose measurements are all there, and puts it into docs/scale.md."""
    known: Known = dict(runner.kept(FOLDER))
    for name, make in {"gate": _gate, "library": _library, "queries": _queries}.items():
        try:
            lines = make(known)
        except KeyError as error:
            print(f"no table {name} yet: {error} is not measured")
            continue
        print("", *lines, sep="\n")
        insert(PAGE, name, lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="these measurements")
    parser.add_argument("--cell", nargs="+", metavar="WORD", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        what, *numbers = args.cell
        runner.keep(FOLDER, tuple(args.cell), MEASURES[what](*map(int, numbers)))
        return
    failed = runner.fill("scripts.bench.scale", FOLDER, [cell for cell in cells() if cell[0] in args.only])
    write()
    if failed:
        sys.exit("these did not finish: " + ", ".join(map(" ".join, failed)))


if __name__ == "__main__":
    main()
