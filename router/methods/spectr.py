"""`spectr`: every token goes to the adapters whose input subspace holds most of it."""

from torch import Tensor

from router.pipeline.per_token import Experts, PerToken, input_norms, keep_top

TOP_K = 4  # as in the authors' code (wfleshman/spectr)
TEMPERATURE = 1.0  # the paper names none


class SpectR(PerToken):
    """Fleshman and Van Durme 2025, SpectR: Dynamically Composing LM Experts, arXiv 2504.03454.

    It is Arrow with all right singular vectors. With `D_i = U_i S_i V_i^T`, the logit of adapter i at a
    module is `norm(V_i^T x)`. A softmax over the 4 largest gives the weights of
    `output = W x + sum_i w_i D_i x`.

    The other reading is `norm(S_i V_i^T x) = norm(D_i x)`, which favours adapters with large updates. The
    authors' next paper (SEQR, 2509.18093) gives it as SpectR's. Their published code and their eqs. 4
    and 7 in LAG (2507.05346) leave S out, and so do we. On our queries this also finds the task's own
    adapter more often.

    Their code differs from ours in two ways. It gives each of the 4 adapters a weight of one quarter. It
    averages the factors A and B separately, which needs equal ranks and adds cross terms between adapters.
    """

    def logits(self, experts: Experts, x: Tensor, along: Tensor) -> Tensor:
        """`norm(V^T x)` of the 4 largest."""
        return keep_top(input_norms(experts, along) / TEMPERATURE, TOP_K)
