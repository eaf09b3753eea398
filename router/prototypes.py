"""An adapter's prototype at each target module: the subspace of inputs that its update reads.

For an update `D = s B A` with thin SVD `U S V^T`, the prototype is the columns of V, each weighted
by its share of the update's energy, `w_j = S_j^2 / sum(S^2)`. For a unit input x the weighted
squared cosine `sum_j w_j (v_j . x)^2` equals `norm(D x)^2 / norm(D)_F^2`: how much of the update
the input sets free, whatever the adapter's size. Knows nothing of queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from merge.factors import svd
from router.adapters import Adapter


@dataclass(frozen=True)
class ModulePrototypes:
    """The prototypes of all adapters at one module, side by side.

    Attributes:
        directions: (d_in, K) orthonormal columns within each adapter.
        weights: (K,) share of the adapter's energy; sums to 1 within each adapter.
        owners: (K,) int64, which adapter a column belongs to.
    """

    directions: Tensor
    weights: Tensor
    owners: Tensor


def prototypes(
    adapters: Sequence[Adapter], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, ModulePrototypes]:
    """The prototypes of a library, by module; computed in float32, stored in `dtype`.

    An adapter has no prototype at a module that it does not change, be it that the module is not
    its target or that its update is zero.
    """
    parts: dict[str, list[tuple[Tensor, Tensor, int]]] = {}
    for owner, adapter in enumerate(adapters):
        for module, update in adapter.read_all():
            _, s, vh = svd(update)
            energy = s.square() / s.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
            keep = energy > 0
            if keep.any():
                parts.setdefault(module, []).append((vh[keep].T, energy[keep], owner))
    return {
        module: ModulePrototypes(
            torch.cat([v for v, _, _ in found], dim=1).to(device, dtype).contiguous(),
            torch.cat([w for _, w, _ in found]).to(device, torch.float32),
            torch.cat([torch.full((len(w),), owner) for _, w, owner in found]).to(device),
        )
        for module, found in parts.items()
    }
