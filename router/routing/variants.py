"""A few merged adapters instead of one per query: decided, materialised, written.

A variant is an exact weighted sum of the library's updates, written as a PEFT folder; router/model/apply.py
answers with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from merge.factors import Factors, recompress, weighted_sum
from merge.folders import LARGEST_RANK, write_adapter
from router.library.adapters import Adapter
from router.model.base import Base
from router.routing.clusters import NEGLIGIBLE, Array

VARIANTS = "variants"  # the folder of variants in an output folder


@dataclass(frozen=True)
class Variant:
    """The merged adapter, or base model, that answers one group of queries.

    Attributes:
        weights: adapter name -> weight, largest first; empty for the plain base model.
        base: the base model's share; all shares sum to 1.
        sha256: of its configuration and weights, once they are written.
        canary: log-probability, in nats, of the likeliest token after CANARY, once it was measured.
    """

    weights: dict[str, float]
    base: float
    sha256: str = field(default="", repr=False)
    canary: float | None = field(default=None, repr=False)


def folder_names(variants: Sequence[Variant]) -> list[str | None]:
    """The name of each variant's folder, its number; None for the plain base model, which has none."""
    return [str(n) if variant.weights else None for n, variant in enumerate(variants)]


def decide(weights: Array, names: Sequence[str]) -> list[Variant]:
    """Turns mean weights into variants.

    Shares below NEGLIGIBLE are dropped and the rest rescaled, so that a group whose queries
    agree on one adapter gets the plain adapter.

    Args:
        weights: (variants, adapters + 1), rows sum to 1, the base model last.
        names: the adapters' names.

    Example:
        >>> decide(np.array([[0.25, 0.745, 0.005]]), ["french", "german"])[0].base
        0.0
        >>> decide(np.array([[0.25, 0.5, 0.25]]), ["french", "german"])
        [Variant(weights={'german': 0.5, 'french': 0.25}, base=0.25)]
    """
    limit = np.minimum(NEGLIGIBLE, weights.max(1, keepdims=True) / 2)  # of many alike none is negligible
    kept = np.where(weights >= limit, weights, 0.0)
    variants = []
    for row in kept / kept.sum(1, keepdims=True):
        top = sorted((n for n in range(len(names)) if row[n] > 0), key=lambda n: (-row[n], n))
        variants.append(Variant({names[n]: float(row[n]) for n in top}, float(row[-1])))
    return variants


def materialise(variant: Variant, adapters: Sequence[Adapter], rank: int | None) -> dict[str, Factors]:
    """The variant's updates by module, in float32: exact, or the best of at most the given rank."""
    parts: dict[str, tuple[list[Factors], list[float]]] = {}
    by_name = {adapter.name: adapter for adapter in adapters}
    for name, weight in variant.weights.items():
        for module, update in by_name[name].read_all():
            updates, weights = parts.setdefault(module, ([], []))
            updates.append(update)
            weights.append(weight)
        by_name[name].check_unchanged()  # or the variant is not what was routed by
    sums = {module: weighted_sum(*part) for module, part in parts.items()}
    return {module: limited(update, rank) for module, update in sums.items()}


def limited(update: Factors, rank: int | None) -> Factors:
    """The update itself if it has at most the given rank, else the best of that rank.

    None is the largest rank that is read: no layer is as wide, so the best of that rank is exact.
    """
    most = min(rank or LARGEST_RANK, LARGEST_RANK)
    return update if update.rank <= most else recompress(update, most)


def complete(updates: Mapping[str, Factors], shapes: Mapping[str, tuple[int, int]]) -> dict[str, Factors]:
    """Adds zero updates so that a kind of module is changed in every layer or in none.

    PEFT and the serving engines name target modules by kind ("q_proj"), so they would expect an update in a
    layer that was left out.
    """
    kinds = {module.rsplit(".", 1)[-1] for module in updates}
    out = {}
    for module, (d_out, d_in) in shapes.items():
        if module in updates:
            out[module] = updates[module]
        elif module.rsplit(".", 1)[-1] in kinds:
            out[module] = Factors(torch.zeros(1, d_in), torch.zeros(d_out, 1))
    return out


def write_variant(
    path: Path, variant: Variant, adapters: Sequence[Adapter], base: Base,
    shapes: Mapping[str, tuple[int, int]], rank: int | None = None,
) -> int:  # fmt: skip
    """Materialises a variant as a PEFT folder in the base model's dtype; returns its rank."""
    updates = complete(materialise(variant, adapters, rank), shapes)
    return write_adapter(path, updates, base.name, base.revision, base.model.dtype, rank)
