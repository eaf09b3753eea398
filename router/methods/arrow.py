"""`arrow`: every token goes to the adapters whose strongest input direction it has most of."""

from __future__ import annotations

from torch import Tensor

from router.per_token import Experts, PerToken, arrow_scores, keep_top

# 4 in the authors' tests (microsoft/mttl; their class by itself cuts nothing off) and in the code of
# SpectR, which compares with it; PEFT's default is 3.
TOP_K = 4
TEMPERATURE = 1.0  # theirs, and PEFT's


class Arrow(PerToken):
    """Ostapenko et al. 2024, Towards Modular LLMs by Building and Reusing .., arXiv 2405.11157.

    Logit of adapter i at a module: `abs(v_i . x)`, with v_i the first right singular vector of
    `D_i = s B A` and x the token as the module gets it: no norm is divided out, it is not a cosine.
    Softmax over the 4 largest, `output = W x + sum_i w_i D_i x`. The absolute value is there since
    a singular vector has no sign.

    v_i is exact here, from the factors' SVD. PEFT's Arrow takes 15 power iterations from a random
    start, which on a flat spectrum is another vector, and needs equal ranks and targets.
    """

    def logits(self, experts: Experts, x: Tensor, along: Tensor) -> Tensor:
        """`abs(v_1 . x)` of the 4 largest."""
        return keep_top(arrow_scores(experts, x) / TEMPERATURE, TOP_K)
