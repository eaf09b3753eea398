"""The committed library with adapters left out, and with decoys added.

Decoys are PEFT folders like any other, written under `output/benchmark/libraries/` from one seed. A copy is
named after the adapter that it comes from, `NAME~copy`, so that a table can tell whose skill it has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from merge.factors import Factors
from merge.folders import write_adapter
from router.adapters import Adapter, load_library

FOLDER = Path("output/benchmark/libraries")
COPY = "~"  # between the name of an adapter and what was done to its copy
RANDOM = 30
SCALES = {"x4": 4.0, "x0.25": 0.25}
GROWN = 200
NOISE = 0.1  # of a grown copy: norm of what is added to each factor, as a share of the factor's own
SEED = 20241


def without(name: str) -> Callable[[Sequence[Adapter]], list[Adapter]]:
    """All adapters but one."""
    return lambda adapters: [adapter for adapter in adapters if adapter.name != name]


def only(name: str) -> Callable[[Sequence[Adapter]], list[Adapter]]:
    """One adapter alone."""
    return lambda adapters: [adapter for adapter in adapters if adapter.name == name]


def skill_of(name: str) -> str:
    """The name of the adapter that a copy was made from; any other name is its own."""
    return name.split(COPY, 1)[0]


def with_random(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adds 30 adapters of random weights, each with the modules, ranks and norms of a real one."""
    generator = torch.Generator().manual_seed(SEED)

    def drawn(update: Factors) -> Factors:
        a, b = (torch.randn(x.shape, generator=generator) for x in update)
        return Factors(a * update.a.norm() / a.norm(), b * update.b.norm() / b.norm())

    sources = [adapters[n % len(adapters)] for n in range(RANDOM)]
    return _with(adapters, "random", ((f"random{n:02}", s, drawn) for n, s in enumerate(sources)))


def with_rescaled(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adds every adapter at four times and at a quarter of its size."""

    def by(scale: float) -> Callable[[Factors], Factors]:
        return lambda update: Factors(update.a, scale * update.b)

    made = ((f"{a.name}{COPY}{mark}", a, by(scale)) for mark, scale in SCALES.items() for a in adapters)
    return _with(adapters, "rescaled", made)


def with_duplicates(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adds every adapter once more."""
    made = ((f"{adapter.name}{COPY}twin", adapter, lambda update: update) for adapter in adapters)
    return _with(adapters, "duplicates", made)


def grown(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Adds perturbed copies until there are 200 adapters."""
    generator = torch.Generator().manual_seed(SEED)

    def perturbed(update: Factors) -> Factors:
        noise = (torch.randn(x.shape, generator=generator) for x in update)
        a, b = (x + NOISE * x.norm() * e / e.norm() for x, e in zip(update, noise, strict=True))
        return Factors(a, b)

    numbers = range(GROWN - len(adapters))
    sources = [adapters[n % len(adapters)] for n in numbers]
    names = [f"{source.name}{COPY}{n:03}" for n, source in zip(numbers, sources, strict=True)]
    return _with(adapters, "grown", zip(names, sources, [perturbed] * len(names), strict=True))


def _with(
    adapters: Sequence[Adapter], kind: str, made: Iterable[tuple[str, Adapter, Callable[[Factors], Factors]]]
) -> list[Adapter]:
    """The adapters and the decoys, which are written if they are not there yet."""
    done = FOLDER / kind / ".done"
    if not done.exists():
        for name, source, change in made:
            updates = {module: change(update) for module, update in source.read_all()}
            base, path = source.folder.base_model, FOLDER / kind / name
            write_adapter(path, updates, base, None, torch.bfloat16)
            if (card := source.folder.path / "README.md").exists() and COPY in name:
                (path / "README.md").write_text(card.read_text("utf-8"), "utf-8")
        done.touch()
    return [*adapters, *load_library([str(FOLDER / kind)])]
