"""Libraries for the benchmarks: the committed one with decoys added, and random ones.

What is made are PEFT folders like any other, under output/benchmark/libraries, each from one seed. A copy is
named after the adapter that it comes from, `NAME~mark`, so that a table can tell whose skill it has.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from merge.factors import Factors
from merge.folders import write_adapter
from router.library.adapters import Adapter, load_library
from router.library.sources import CARD_FILE
from router.model.base import linear_shapes
from scripts.bench.score import COPY

FOLDER = Path("output/benchmark/libraries")
RANDOM = 30
GROWN = 200
NOISE = 0.1  # of a grown copy: norm of what is added to each factor, as a share of the factor's own
SEED = 20241

Change = Callable[[Factors], Factors]
Choice = Callable[[Sequence[Adapter]], list[Adapter]]


def with_random(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adds 30 adapters of random weights, each with the modules, ranks and norms of a real one."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(update: Factors) -> Factors:
        a, b = (torch.randn(x.shape, generator=generator) for x in update)
        return Factors(a * update.a.norm() / a.norm(), b * update.b.norm() / b.norm())

    sources = [adapters[n % len(adapters)] for n in range(RANDOM)]
    return _with(adapters, "random", ((f"random{n:02}", s, drawn) for n, s in enumerate(sources)))


def scaled(kind: str, scales: Mapping[str, float]) -> Choice:
    """Adds copies of every adapter at some sizes, which are named by their marks."""

    def by(scale: float) -> Change:
        return lambda update: Factors(update.a, scale * update.b)

    def with_copies(adapters: Sequence[Adapter]) -> list[Adapter]:
        made = ((f"{a.name}{COPY}{mark}", a, by(scale)) for mark, scale in scales.items() for a in adapters)
        return _with(adapters, kind, made)

    return with_copies


def grown(adapters: Sequence[Adapter], size: int = GROWN) -> list[Adapter]:
    """Adds perturbed copies until there are so many adapters."""
    generator = torch.Generator().manual_seed(SEED)

    def perturbed(update: Factors) -> Factors:
        noise = (torch.randn(x.shape, generator=generator) for x in update)
        a, b = (x + NOISE * x.norm() * e / e.norm() for x, e in zip(update, noise, strict=True))
        return Factors(a, b)

    numbers = range(size - len(adapters))
    sources = [adapters[n % len(adapters)] for n in numbers]
    names = [f"{source.name}{COPY}{n:03}" for n, source in zip(numbers, sources, strict=True)]
    return _with(adapters, f"grown{size}", zip(names, sources, [perturbed] * len(names), strict=True))


def _with(
    adapters: Sequence[Adapter], kind: str, made: Iterable[tuple[str, Adapter, Change]]
) -> list[Adapter]:
    """The adapters and the decoys, which are written if they are not there yet."""
    done = FOLDER / kind / ".done"
    if not done.exists():
        for name, source, change in made:
            updates = {module: change(update) for module, update in source.read_all()}
            base, path = source.folder.base_model, FOLDER / kind / name
            write_adapter(path, updates, base, None, torch.bfloat16)
            if (card := source.folder.path / CARD_FILE).exists() and COPY in name:
                (path / CARD_FILE).write_text(card.read_text("utf-8"), "utf-8")
        done.touch()
    return [*adapters, *load_library([str(FOLDER / kind)])]


def uniform(model: Any, base_model: str, rank: int, count: int, folder: Path, within: str = "") -> None:
    """Writes seeded random adapters of one rank on all linear layers, as small as trained ones.

    Args:
        base_model: what they name as theirs.
        folder: where they are written.
        within: only on modules that have this in their name.
    """
    shapes = {module: shape for module, shape in linear_shapes(model).items() if within in module}
    generator = torch.Generator().manual_seed(SEED)
    for n in range(count):
        updates = {
            module: Factors(
                torch.randn(rank, d_in, generator=generator) / d_in**0.5,
                torch.randn(d_out, rank, generator=generator) * 0.01,
            )
            for module, (d_out, d_in) in shapes.items()
        }
        write_adapter(folder / f"uniform{n:05}", updates, base_model, None, torch.bfloat16)
