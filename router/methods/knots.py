"""`knots`: one static merge, TIES in a basis that all adapters share (KnOTS-TIES)."""

import torch
from torch import Tensor

from merge.dense import ties
from merge.factors import Factors, support
from router.pipeline.steps import Static


class Knots(Static):
    """Stoica et al. 2024, Model Merging with SVD to Tie the KnOTS, arXiv 2410.19735, section 4.

    With `[D_1 .. D_n] = U S [V_1^T .. V_n^T]`, the merged update is `U TIES(S V_1^T, .., S V_n^T)`. S is
    with V when trimming ranks the entries, as in the authors' configurations. The paper writes S with U,
    which changes nothing but that ranking. The authors tune k and lambda on validation data. Here they
    are those of TIES: k = 20 % (also the authors' for vision) and lambda = 1. The result's rank is at most
    the sum of ranks.

    The SVD runs on the factors: `[D_1 .. D_n] = [B_1 .. B_n] @ diag(A_1 .. A_n)`, block-diagonal.
    """

    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """TIES on each update's coordinates in the left singular basis of all updates side by side."""
        a: Tensor = torch.block_diag(*(update.a for update in updates))  # type: ignore[no-untyped-call]
        b = torch.cat([update.b for update in updates], dim=1)
        u, s, vh = support(Factors(a, b))  # a is (sum of ranks, n * d_in), b (d_out, sum of ranks)
        d_in = updates[0].a.shape[1]
        coordinates = (s[:, None] * vh).view(len(s), len(updates), d_in).transpose(0, 1)  # (n, k, d_in)
        return Factors(ties(coordinates), u)
