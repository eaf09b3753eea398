"""`knots`: one static merge, TIES in a basis that all adapters share (KnOTS-TIES)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge.dense import KEEP, ties
from merge.factors import Factors, support
from router.pipeline.steps import Static


def _blocks(matrices: Sequence[Tensor]) -> Tensor:
    blocks: Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
    return blocks


def aligned_ties(updates: Sequence[Factors], keep: float = KEEP) -> Factors:
    """TIES on each update's coordinates in the left singular basis of all updates side by side.

    The SVD runs on the factors: `[D_1 .. D_n] = [B_1 .. B_n] @ diag(A_1 .. A_n)`, block-diagonal.
    """
    side_by_side = Factors(
        _blocks([update.a for update in updates]),  # (sum of ranks, n * d_in)
        torch.cat([update.b for update in updates], dim=1),  # (d_out, sum of ranks)
    )
    u, s, vh = support(side_by_side)
    d_in = updates[0].a.shape[1]
    coordinates = (s[:, None] * vh).view(len(s), len(updates), d_in).transpose(0, 1)  # (n, k, d_in)
    return Factors(ties(coordinates, keep), u)


class Knots(Static):
    """Stoica et al. 2024, Model Merging with SVD to Tie the KnOTS, arXiv 2410.19735, section 4.

    With `[D_1 .. D_n] = U S [V_1^T .. V_n^T]`, the merged update is `U TIES(S V_1^T, .., S V_n^T)`. S is
    with V when trimming ranks the entries, as in the authors' configurations. The paper writes S with U,
    which changes nothing but that ranking. The authors tune k and lambda on validation data. Here they
    are those of TIES: k = 20 % (also the authors' for vision) and lambda = 1. The result's rank is at most
    the sum of ranks.
    """

    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """KnOTS-TIES."""
        return aligned_ties(updates)
