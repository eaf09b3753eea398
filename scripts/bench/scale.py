"""What large libraries cost, and how fast that grows: `python -m scripts.bench.scale`.

Writes two tables of docs/scale.md: the gate with up to 10,000 adapters, and whole runs with libraries that
change one layer. What was measured is kept in a file under output/benchmark/scale; delete it to measure it
anew.

Passes with 10,000 adapters take seconds a query, so the gate's responses are resampled. Those of the
committed library to generic text and to its labelled queries are real. A further adapter has a real one as
its parent: the same means and deviations, and for each text a share of the parent's response, from 0.3 to
0.95, beside the parent's response to another text. So there are families of close and of distant relatives. A
further query is mostly a real one.
"""

import sys
import tempfile
import time
from argparse import ArgumentParser, RawTextHelpFormatter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from router.model.base import EMBEDDED, load_base
from router.queries.submission import read_queries
from router.routing.large import gate_for
from router.system.stages import peak_mib
from scripts.bench import development, libraries, runner
from scripts.bench.markdown import header, insert, row
from scripts.bench.responses import measured
from scripts.bench.runner import Cell, Found, timed

PAGE = Path("docs/scale.md")
QUERIES = Path("data/test.csv")
SIZES = (16, 64, 256, 1_000, 10_000)  # adapters
SEED = 6
TEXTS = 300  # real queries
BLOCK = 256  # adapters that are resampled at a time
OWN = 0.95  # of a further query: the share of the real one
LOW, HIGH = 0.3, 0.95  # of a further adapter: the share of its parent
NUMBERS = 1 << 25  # responses in memory
JUDGED = 1_000  # queries for which shortlists are judged
ASKED, RANK = 64, 4  # queries of whole runs, and the rank of their adapters
# Rows of the tables with a column for each size: what a cell found, and how it is written.
ROWS = {
    "gate": {
        "gate, ms a query": ("ms", ".2f"), "fit, s": ("fit", ".1f"), "peak memory, MiB": ("peak_mib", ",.0f"),
        "best adapter on the shortlist": ("recall", ".4f"),
    },
    "library": {
        **{f"{stage}, s": (stage, ".2f") for stage in ("prototypes", "calibrate", "probe")},
        "peak memory, MiB": ("peak_mib", ",.0f"),
    },
}  # fmt: skip
Known = dict[Cell, Found]
Responses = NDArray[np.float32]


class Library:
    """So many adapters, of which the first are real."""

    def __init__(self, size: int) -> None:
        (committed,) = (of for of in development.libraries() if of.name == development.COMMITTED)
        real = measured(committed)
        some = real.responses[:: len(real.responses) // TEXTS]
        reference, queries = (np.log(found.clip(1e-6)) for found in (real.reference, some))
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


def gate(size: int) -> Found:
    """The gate: its fit, the weights of a query, and whether its shortlist holds the best adapter."""
    drawn = Library(size)
    reference = drawn.reference()
    fit, estimator = timed(partial(gate_for(size).fit, reference), time.process_time)
    some = max(1, min(JUDGED, NUMBERS // reference[0].size))
    del reference
    times: list[float] = []
    listed: list[bool] = []
    for seed in range(-(-JUDGED // some)):
        responses = drawn.queries(some, seed)
        times.append(timed(partial(estimator.predict_proba, responses), time.process_time)[0] / some)
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
    with tempfile.TemporaryDirectory() as folder:
        adapters, cache = Path(folder) / "library", f"{folder}/cache"
        libraries.uniform(base.model, base.name, RANK, size, adapters, ".layers.29.")
        words = ["-m", "proto_route", "--max_gen_len", "1", "--adapters", str(adapters)]
        found = runner.run(read_queries(QUERIES)[:ASKED], *words, cache=cache)
    return {**found["stages"], "peak_mib": found["peak_mib"]}


MEASURES: dict[str, Callable[[int], Found]] = {"gate": gate, "library": library}


def growth(sizes: list[float], values: list[float]) -> float:
    """The exponent p of `value = c * size ** p`, by least squares on logarithms.

    Example:
        >>> round(growth([1, 10, 100], [3, 30, 300]), 6)
        1.0
    """
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-3)), 1)[0])


def by_size(known: Known, what: str) -> list[str]:
    """A row for each figure, a column for each size, and the exponent from 256 adapters on."""
    lines = header(["adapters", *(f"{size:,}" for size in SIZES), "exponent"])
    for name, (figure, how) in ROWS[what].items():
        values = [known[what, str(size)][figure] for size in SIZES]
        grown = f"{growth([float(size) for size in SIZES[2:]], values[2:]):.2f}"
        lines.append(row(name, *(f"{value:{how}}" for value in values), grown))
    return lines


def main() -> None:
    """Command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="these measurements")
    args = parser.parse_args()
    cells = [((what, str(size)), partial(MEASURES[what], size)) for size in SIZES for what in args.only]
    failed = runner.fill("scale", cells)
    known: Known = dict(runner.kept("scale"))
    for name in ROWS:
        try:
            lines = by_size(known, name)
        except KeyError as error:
            print(f"no table {name} yet: {error} is not measured")
            continue
        print("", *lines, sep="\n")
        insert(PAGE, name, lines)
    sys.exit(failed)


if __name__ == "__main__":
    main()
