"""`spectr`: every token goes to the adapters whose update answers it with the largest norm."""

from __future__ import annotations

from torch import Tensor

from router.per_token import Experts, PerToken, keep_top, norms

TOP_K = 4  # as in the authors' code (wfleshman/spectr)
TEMPERATURE = 1.0  # none is named


class SpectR(PerToken):
    """Fleshman and Van Durme 2025, SpectR: Dynamically Composing LM Experts, arXiv 2504.03454.

    Arrow with the whole spectrum: logit of adapter i at a module `norm(S_i V_i^T x)`, with
    `D_i = U_i S_i V_i^T`; softmax over the 4 largest, `output = W x + sum_i w_i D_i x`. This is
    `norm(D_i x)`, what the authors' next paper (SEQR, 2509.18093) proves of SpectR.

    The authors' published code differs in three ways: it leaves S out of the score, gives each of
    the 4 a quarter, and averages the factors A and B apart, which needs equal ranks and adds cross
    terms between adapters.
    """

    def logits(self, experts: Experts, x: Tensor, along: Tensor) -> Tensor:
        """`norm(S V^T x)` of the 4 largest."""
        return keep_top(norms(experts, along) / TEMPERATURE, TOP_K)
