"""What an adapter that was made to attract queries costs: `python -m scripts.docs.hostile`.

Puts hostile adapters beside the libraries that are at hand, routes the labelled queries, and writes the table
into docs/reliability.md. A query that is answered otherwise than before, rightly or not, counts with all that
the benchmark's answer to it scored, so the points are the most that the mean score can fall. Nothing is
answered. Reads labels, so nothing that routes may import it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from merge.factors import Factors, inner
from merge.folders import write_adapter
from router.constants import BASE_COLUMN
from router.library.adapters import Adapter, load_library
from router.library.command import OUTLIER
from router.model.answer import encode
from router.model.base import Base, linear_shapes, load_base
from router.model.hooks import reading_inputs
from router.model.passes import batches, forward, truncated
from router.routing.calibration import Calibration, generic_prompts
from router.routing.clusters import mixes
from router.routing.fitted import Fitted
from router.routing.gate import PrototypeGate
from router.routing.probe import Probed, counted_tokens, probe
from router.routing.prototypes import of_some, prototypes
from scripts.bench import runner
from scripts.bench.development import Labelled, libraries
from scripts.bench.markdown import header, insert, row
from scripts.bench.quality.cells import COLUMNS
from scripts.bench.quality.cells import FOLDER as CELLS
from scripts.bench.quality.settings import OURS, QUERIES

OUT, FOLDER = Path("docs/reliability.md"), Path("output/hostile")
RANK = 16
SYBILS = 20
NOISE = 0.1  # of a sybil: norm of what is added to a factor, as a share of the factor's own
SEED = 0

Updates = dict[str, Factors]


def moments(base: Base) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean (d_in,) and covariance (d_in, d_in) of each linear module's inputs over generic text."""
    rows, shapes = truncated(encode(base.tokenizer, generic_prompts())), linear_shapes(base.model)
    sums = {m: (torch.zeros(d_in), torch.zeros(d_in, d_in)) for m, (_, d_in) in shapes.items()}

    def read(ids: Tensor, mask: Tensor) -> int:
        counted = counted_tokens(mask)

        def visit(name: str, x: Tensor) -> None:
            x = x[counted].float()  # (T', d_in)
            sums[name][0].add_(x.sum(0))
            sums[name][1].addmm_(x.T, x)

        with reading_inputs(base.model, list(shapes), visit):
            forward(base.model, ids, mask)
        return int(counted.sum())

    with torch.inference_mode():
        count = sum(n for _, n in batches(base.model, rows, base.tokenizer.pad_token_id, "moments", read))
    found = {}
    for name, (total, square) in sums.items():
        mean = total / count
        found[name] = mean, square / count - torch.outer(mean, mean)
    return found


class Attacker:
    """Makes hostile adapters against one library."""

    def __init__(self, base: Base, adapters: Sequence[Adapter]) -> None:
        self.base, self.adapters = base, adapters
        self.shapes = linear_shapes(base.model)
        self.moments = moments(base)
        self.generator = torch.Generator().manual_seed(SEED)
        self.norm = float(np.median([_norm(adapter) for adapter in adapters]))

    def reading(self, rows: Callable[[str], Tensor]) -> Updates:
        """An adapter that reads given inputs, (r, d_in) orthonormal, and writes noise; as large as others."""
        size = self.norm / (RANK * len(self.shapes)) ** 0.5
        found = {}
        for module, (d_out, _) in self.shapes.items():
            a = rows(module)
            b = torch.randn(d_out, len(a), generator=self.generator)
            found[module] = Factors(a, b * size / b.norm(dim=0))
        return found

    def noise(self, module: str) -> Tensor:
        """Random directions."""
        drawn = torch.randn(self.shapes[module][1], RANK, generator=self.generator)
        found: Tensor = torch.linalg.qr(drawn)[0].T
        return found

    def mean(self, module: str) -> Tensor:
        """The direction of the mean input."""
        mean = self.moments[module][0]
        found: Tensor = (mean / mean.norm())[None]
        return found

    def principal(self, module: str) -> Tensor:
        """The directions that text has most of."""
        found: Tensor = torch.linalg.eigh(self.moments[module][1])[1][:, -RANK:].T
        return found

    def least(self, energy: float) -> Callable[[str], Tensor]:
        """The directions whose energy is nearest to this share of the mean."""

        def rows(module: str) -> Tensor:
            values, vectors = torch.linalg.eigh(self.moments[module][1])
            order = (values / values.mean() - energy).abs().argsort()
            found: Tensor = vectors[:, order[:RANK]].T
            return found

        return rows

    def together(self) -> Callable[[str], Tensor]:
        """The directions that most adapters read."""
        protos = prototypes(self.adapters)

        def rows(module: str) -> Tensor:
            if module not in protos:
                return self.noise(module)
            proto = protos[module]
            u, _, _ = torch.linalg.svd(proto.directions * proto.weights.sqrt(), full_matrices=False)
            found: Tensor = u[:, :RANK].T
            return found

        return rows

    def turned(self, adapter: Adapter) -> Updates:
        """It reads what a good adapter reads, just as strongly, and writes something else."""
        found = {}
        for module, update in adapter.read_all():
            signs = torch.randint(0, 2, (len(update.b), 1), generator=self.generator) * 2 - 1
            order = torch.randperm(len(update.b), generator=self.generator)
            found[module] = Factors(update.a, (signs * update.b)[order])
        return found

    def near(self, updates: Updates) -> Updates:
        """A perturbed copy."""

        def moved(x: Tensor) -> Tensor:
            e = torch.randn(x.shape, generator=self.generator)
            found: Tensor = x + NOISE * x.norm() / e.norm() * e
            return found

        return {module: Factors(moved(update.a), moved(update.b)) for module, update in updates.items()}


def _norm(adapter: Adapter) -> float:
    return float(np.sqrt(sum(inner(update, update) for _, update in adapter.read_all())))


def attacks(attacker: Attacker) -> Iterator[tuple[str, dict[str, Updates], bool]]:
    """The attacks: what each adds to the library, by name, and whether that is listed first."""
    random, principal = attacker.reading(attacker.noise), attacker.reading(attacker.principal)

    def copies(updates: Updates) -> dict[str, Updates]:
        return {f"copy{n:02}": attacker.near(updates) for n in range(SYBILS)}

    large = {module: Factors(1000 * update.a, update.b) for module, update in random.items()}
    yield "random, a thousand times as large", {"large": large}, False
    yield "reads the mean", {"mean": attacker.reading(attacker.mean)}, False
    yield "reads the first principal directions", {"principal": principal}, False
    yield "reads the last principal directions", {"last": attacker.reading(attacker.least(0))}, False
    yield (
        "reads directions of 0.3 of the mean energy",
        {"quiet": attacker.reading(attacker.least(0.3))},
        False,
    )
    yield "reads what most adapters read", {"together": attacker.reading(attacker.together())}, False
    independent = {f"random{n:02}": attacker.reading(attacker.noise) for n in range(SYBILS)}
    yield f"{SYBILS} random ones", independent, False
    yield f"{SYBILS} copies of a random one", copies(random), False
    yield f"{SYBILS} copies of the first principal one", copies(principal), False
    turned = {f"turned{n:02}": attacker.turned(adapter) for n, adapter in enumerate(attacker.adapters)}
    yield "of each adapter a copy that writes something else", turned, False
    yield f"{SYBILS} copies of one of these", copies(turned["turned00"]), False
    yield "one of these, listed first", {"turned": turned["turned00"]}, True


def worth(of: Labelled) -> NDArray[np.float64]:
    """What the benchmark's answer to each query scored, (queries,); 1 where it is not known."""
    file = runner.file_of(CELLS, (of.name, QUERIES, OURS, "0"))
    parts = json.loads(file.read_text("utf-8")) if file.exists() else []
    place = COLUMNS.index("score")
    known = {
        tuple(line[:3]): line[place]
        for part in parts
        for line in part["answers"]
        if not np.isnan(line[place])
    }
    keys = zip(of.rows["split"], of.rows["task"], of.rows["id"], strict=True)
    return np.array([known.get(key, 1.0) for key in keys], dtype=float)


def cost(of: Labelled) -> Iterator[tuple[str, float, float, float, str]]:
    """For each attack what it costs, and what the run says of it.

    Yields:
        The attack; the share of queries that were decided rightly and now are not; what the answers scored
        to queries that are now answered otherwise, the mean over tasks, at most so much of the score; the
        share that hostile adapters answer; the flag.
    """
    base, own = load_base(of.base, "cpu", "float32"), load_library([str(of.adapters)])
    attacker = Attacker(base, own)
    hostile: dict[str, list[Adapter]] = {}
    listed_first = set()
    for number, (title, made, first) in enumerate(attacks(attacker)):
        folder = FOLDER / of.name / str(number)
        for name, updates in made.items():
            if not (folder / name).exists():
                write_adapter(folder / name, updates, own[0].folder.base_model)
        hostile[title] = load_library([str(folder)])
        listed_first |= {title} if first else set()
    every = [*own, *(adapter for group in hostile.values() for adapter in group)]
    protos, calibration = prototypes(every), Calibration(base)
    means = calibration.means(list(protos))
    reference, confidence = calibration.responses(every, protos, means), calibration.confidence()
    rows = truncated(encode(base.tokenizer, of.rows["input"].tolist()))
    probed = probe(base.model, rows, base.tokenizer.pad_token_id, protos, means, len(every), of.name)

    def decided(group: list[int]) -> tuple[Any, Fitted]:
        theirs = of_some(protos, sorted(group), len(every))
        fitted = Fitted.learn(
            [every[n] for n in group], theirs, means, PrototypeGate(), reference[:, group], confidence
        )
        weights, _ = fitted.decide(Probed(probed.responses[:, group], probed.confidence))
        return mixes(weights), fitted

    def right(weights: Any, names: list[str]) -> Any:
        """Whether most of an answer is the right adapter's, (queries,)."""
        places = {name: k for k, name in enumerate([*names, BASE_COLUMN])}
        return np.array(
            [row[places[label]] > 0.5 for row, label in zip(weights, of.rows["adapter"], strict=True)]
        )

    plain, fitted = decided(list(range(len(own))))
    scored, names = worth(of), fitted.names
    tasks = [of.rows["split"], of.rows["task"]]
    before, start = right(plain, names), len(own)
    for title, group in hostile.items():
        members = list(range(start, start + len(group)))
        start += len(group)
        ours = list(range(len(own)))
        weights, fitted = decided(members + ours if title in listed_first else ours + members)
        lost = before & ~right(weights, fitted.names)
        theirs = [fitted.names.index(adapter.name) for adapter in group]
        kept = [*(fitted.names.index(name) for name in names), -1]
        otherwise = np.abs(weights[:, kept] - plain).sum(1) > 1e-6  # its mix, or the hostile adapters' share
        pairs = [(n, fitted.representative[n]) for n in fitted.lookalikes]
        aside = ["look-alike"] * any(not set(pair).isdisjoint(theirs) for pair in pairs)
        aside += ["duplicate"] * any(
            fitted.representative[n] != n and n not in fitted.lookalikes for n in theirs
        )
        aside += ["silent"] * any(n in fitted.silent for n in theirs)
        aside += ["outlier"] * any(_norm(adapter) > OUTLIER * attacker.norm for adapter in group)
        taken = weights[:, theirs].sum(1) > 0.25
        points = float(
            pd.Series(otherwise * scored).groupby([list(column) for column in tasks]).mean().mean()
        )
        yield title, float(lost.mean()), points, float(taken.mean()), ", ".join(aside) or "nothing"


def _flags(flags: dict[str, str]) -> str:
    """What the run says of an attack; of which libraries, if it does not say the same of all."""
    by_flag: dict[str, list[str]] = {}
    for library, flag in flags.items():
        by_flag.setdefault(flag, []).append(library)
    if len(by_flag) == 1:
        return next(iter(by_flag))
    return "; ".join(f"{flag} ({', '.join(libraries)})" for flag, libraries in by_flag.items())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    found = {of.name: list(cost(of)) for of in libraries()}
    names = [f"{name}: {what}" for name in found for what in ("lost", "points", "taken")]
    lines = header(["attack", "flagged as", *names], 2)
    for group in zip(*found.values(), strict=True):
        shares = [f"{100 * share:.1f}" for _, *costs, _ in group for share in costs]
        lines.append(
            row(group[0][0], _flags(dict(zip(found, (one[-1] for one in group), strict=True))), *shares)
        )
    insert(OUT, "hostile", lines)


if __name__ == "__main__":
    main()
