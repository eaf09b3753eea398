"""An adapter's prototype at each target module: the subspace of inputs that its update reads.

For an update `D = s B A` with thin SVD `U S V^T`, the prototype is the columns of V, each weighted
by its share of the singular values, `w_j = S_j / sum(S)`. The weighted squared cosine of an input x
to it is `sum_j w_j (v_j . x)^2 / norm(x)^2`: how much of x lies where the update reads, whatever the
adapter's size. With `S_j^2` as weights it would be `norm(D x)^2 / (norm(D)_F norm(x))^2`, which leans on
the first direction alone. With equal weights it would drown in the directions that training left as
they were initialised. Knows nothing of queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from merge.factors import stacks, svd
from router.library.adapters import Adapter
from router.library.store import content, load, save
from router.system.progress import progress

FORMAT = 1  # raise it when prototypes are computed in another way


@dataclass(frozen=True)
class ModulePrototypes:
    """The prototypes of all adapters at one module, side by side.

    Attributes:
        directions: (d_in, K) orthonormal columns within each adapter.
        weights: (K,) share of the adapter's singular values; sums to 1 within each adapter.
        owners: (K,) int64, which adapter a column belongs to; in ascending order.
    """

    directions: Tensor
    weights: Tensor
    owners: Tensor

    def sums(self, columns: Tensor, n_adapters: int) -> Tensor:
        """Each adapter's weighted sum over its own columns, (adapters, n); 0 where it has none.

        Args:
            columns: (K, n), a row for each column of `directions`.
        """
        if (known := self._bags.get(n_adapters)) is None:
            rows, numbers = (torch.arange(n, device=columns.device) for n in (len(self.owners), n_adapters))
            known = self._bags[n_adapters] = rows, torch.searchsorted(self.owners, numbers)
        rows, starts = known
        # A bag of rows for each adapter: linear in K.
        total: Tensor = embedding_bag(rows, columns, starts, mode="sum", per_sample_weights=self.weights)
        return total

    @cached_property
    def _bags(self) -> dict[int, tuple[Tensor, Tensor]]:
        """The rows, and the first of each adapter's, by how many adapters there are: made once."""
        return {}


def prototypes(
    adapters: Sequence[Adapter], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, ModulePrototypes]:
    """The prototypes of a library, by module; computed in float32, stored and kept on disk in `dtype`.

    An adapter has no prototype at a module that it does not change: one that it does not target, or where
    its update is zero.
    """
    folder = f"prototypes/{FORMAT}-torch{torch.__version__}-{dtype}"
    parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {}  # by module
    for owner, adapter in enumerate(progress(adapters, desc="prototypes", unit="adapter")):
        name = f"{folder}/{content(adapter)}"
        if (known := load(name)) is None:
            save(name, known := subspaces(adapter, dtype))
        for module in {key.rpartition(".")[0] for key in known}:
            part = owner, known[f"{module}.directions"], known[f"{module}.weights"]
            parts.setdefault(module, []).append(part)
    by_module = {}
    for module in sorted(parts):
        owners, directions, weights = zip(*parts.pop(module), strict=True)  # at most one module twice
        columns = torch.tensor([len(shares) for shares in weights])
        by_module[module] = ModulePrototypes(
            torch.cat(directions, 1).to(device),
            torch.cat(weights).to(device),
            torch.tensor(owners).repeat_interleave(columns).to(device),
        )
    return by_module


def of_some(
    protos: Mapping[str, ModulePrototypes], owners: Sequence[int], n_adapters: int
) -> Mapping[str, ModulePrototypes]:
    """The prototypes of some of a library's adapters, numbered as given; no copy if that is all of them.

    Args:
        owners: numbers of the adapters, in ascending order.
    """
    if list(owners) == list(range(n_adapters)):
        return protos
    by_module = {}
    for module, proto in protos.items():
        number = torch.full((n_adapters,), -1, device=proto.owners.device)
        number[list(owners)] = torch.arange(len(owners), device=number.device)
        mine = number[proto.owners] >= 0  # (K,)
        if mine.any():
            columns = proto.directions[:, mine], proto.weights[mine], number[proto.owners[mine]]
            by_module[module] = ModulePrototypes(*columns)
    return by_module


def subspaces(adapter: Adapter, dtype: torch.dtype) -> dict[str, Tensor]:
    """An adapter's directions (d_in, k) in `dtype`, and weights (k,) float32: the SVD of its updates."""
    tensors = {}
    for modules, stack in stacks(adapter.read_all()):
        _, s, vh = svd(stack)  # (modules, k), (modules, k, d_in)
        shares = s / s.sum(1, keepdim=True).clamp_min(torch.finfo(s.dtype).tiny)
        for module, share, v in zip(modules, shares, vh.mT, strict=True):
            keep = share > 1e-6  # below that it is rounding, not a direction
            if keep.any():
                tensors[f"{module}.directions"] = v[:, keep].to(dtype)
                tensors[f"{module}.weights"] = share[keep]
    adapter.check_unchanged()
    return tensors
