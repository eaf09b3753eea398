"""`lag`: Arrow finds a few adapters for every token, and SpectR picks one of them."""

import torch
from torch import Tensor

from router.pipeline.per_token import Experts, PerToken, arrow_scores, input_norms, keep_top

CANDIDATES = 20  # the paper's k
TOP_K = 1  # "select a single adapter for each position", their eqs. 7 and 8


class Lag(PerToken):
    """Fleshman and Van Durme 2025, LoRA-Augmented Generation, arXiv 2507.05346.

    There are two stages for every token and module. Arrow finds the 20 adapters with the largest
    `abs(v_i . x)`. Of these, the one with the largest SpectR score is applied in full,
    `output = W x + D_i x`. In a library of at most 20 adapters, this is SpectR with one adapter.

    The SpectR score is `norm(V^T x)`, as in the paper's eqs. 4 and 7 and in `spectr`, which explains the
    other reading, with S, and why it is not used. The paper's second library, of knowledge adapters
    beside those of tasks, has no counterpart here.
    """

    def logits(self, experts: Experts, x: Tensor, along: Tensor) -> Tensor:
        """The SpectR score of the best of Arrow's 20, minus infinity for all others."""
        shortlist = keep_top(arrow_scores(experts, x), CANDIDATES) > -torch.inf
        return keep_top(input_norms(experts, along).masked_fill(~shortlist, -torch.inf), TOP_K)
