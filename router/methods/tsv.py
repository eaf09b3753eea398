"""`tsv`: one static merge that makes the adapters' singular vectors orthogonal to each other."""

import torch
from torch import Tensor

from merge.factors import ROUNDING, Factors, from_svd, support
from router.pipeline.steps import Static

SCALE = 1.0  # the paper's alpha for TSV-Merge, which it fixes instead of tuning


def orthogonal(columns: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns, (d, k): the solution of the Procrustes problem.

    It is `P Q^T` for the SVD `P S Q^T`. If the columns are linearly dependent, it is not unique; directions
    that they do not span are then left out, so that equal adapters share one direction.
    """
    p, s, qh = torch.linalg.svd(columns, full_matrices=False)
    real = s > ROUNDING
    nearest: Tensor = p[:, real] @ qh[real]
    return nearest


class Tsv(Static):
    """Gargiulo et al. 2025, Task Singular Vectors, arXiv 2412.00081, TSV-Merge, Algorithm 1.

    The SVD `D_i = U_i S_i V_i^T` of each of the n adapters is cut to its first `min(d_out, d_in) / n`
    components. `U = [U_1 .. U_n]` and `V = [V_1 .. V_n]` are replaced by their nearest orthonormal matrices
    U' and V'. The merged update is `alpha * U' diag(S_1 .. S_n) V'^T`. An adapter of smaller rank gives all
    it has: components of singular value 0 would only take room from the others.
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
