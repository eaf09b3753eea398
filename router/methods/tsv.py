"""`tsv`: one static merge that makes the adapters' singular vectors orthogonal to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from merge.factors import ROUNDING, Factors, from_svd, support
from router.merges import Static

SCALE = 1.0  # the paper's alpha for TSV-Merge, which it keeps instead of tuning


def orthogonal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, (d, k): the solution of the Procrustes problem.

    `P Q^T` for the SVD `P S Q^T`. Where columns depend on each other that is not unique; what they
    do not span is then left out, so that adapters that are the same share one direction.
    """
    p, s, qh = torch.linalg.svd(columns, full_matrices=False)
    real = s > ROUNDING
    nearest: Tensor = p[:, real] @ qh[real]
    return nearest


class Tsv(Static):
    """Gargiulo et al. 2025, Task Singular Vectors, arXiv 2412.00081, TSV-Merge, Algorithm 1.

    `D_i = U_i S_i V_i^T`, cut to the first `min(d_out, d_in) / n` components of each of the n
    adapters; `U = [U_1 .. U_n]` and `V = [V_1 .. V_n]` are replaced by their nearest orthonormal
    matrices; merged update `alpha * U' diag(S_1 .. S_n) V'^T`. An adapter of smaller rank gives
    all it has: components of singular value 0 would only take room from the others.
    """

    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """TSV-Merge on the factors."""
        d_out, d_in = updates[0].b.shape[0], updates[0].a.shape[1]
        share = max(1, min(d_out, d_in) // len(updates))
        parts = [support(update) for update in updates]
        u = orthogonal(torch.cat([u[:, :share] for u, _, _ in parts], dim=1))  # (d_out, k)
        s = SCALE * torch.cat([s[:share] for _, s, _ in parts])  # (k,)
        v = orthogonal(torch.cat([vh[:share] for _, _, vh in parts]).T)  # (d_in, k)
        return from_svd(u, s, v.T)
