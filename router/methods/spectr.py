"""`spectr`: every token goes to the adapters whose update sees most of it, in all its directions."""

from __future__ import annotations

from torch import Tensor

from router.per_token import Experts, PerToken, input_norms, keep_top

TOP_K = 4  # as in the authors' code (wfleshman/spectr)
TEMPERATURE = 1.0  # none is named


class SpectR(PerToken):
    """Fleshman and Van Durme 2025, SpectR: Dynamically Composing LM Experts, arXiv 2504.03454.

    Arrow with all right singular vectors: logit of adapter i at a module `norm(V_i^T x)`, with
    `D_i = U_i S_i V_i^T`; softmax over the 4 largest, `output = W x + sum_i w_i D_i x`.

    The other reading is `norm(S_i V_i^T x) = norm(D_i x)`, which the authors' next paper (SEQR,
    2509.18093) gives as SpectR's: it favours adapters with large updates. Their published code and
    their eqs. 4 and 7 in LAG (2507.05346) leave S out, and so do we; on our queries this also
    finds the task's own adapter more often.

    Their code differs from ours in two ways: it gives each of the 4 a quarter, and averages the
    factors A and B apart, which needs equal ranks and adds cross terms between adapters.
    """

    def logits(self, experts: Experts, x: Tensor, along: Tensor) -> Tensor:
        """`norm(V^T x)` of the 4 largest."""
        return keep_top(input_norms(experts, along) / TEMPERATURE, TOP_K)
