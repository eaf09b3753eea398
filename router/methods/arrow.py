"""`arrow`: every token goes to the adapters whose strongest input direction it follows most."""

from torch import Tensor

from router.pipeline.per_token import Experts, PerToken, arrow_scores, keep_top

# 4 in the authors' tests (microsoft/mttl; their class alone cuts nothing off) and in the code of SpectR,
# which compares with Arrow. PEFT's default is 3.
TOP_K = 4
TEMPERATURE = 1.0  # the authors' and PEFT's


class Arrow(PerToken):
    """Ostapenko et al. 2024, Towards Modular LLMs by Building and Reusing .., arXiv 2405.11157.

    The logit of adapter i at a module is `abs(v_i . x)`, with v_i the first right singular vector of
    `D_i = s B A` and x the module's input for the token. It is not a cosine: no norm is divided out. A
    softmax over the 4 largest gives the weights of `output = W x + sum_i w_i D_i x`. The absolute value
    is there since a singular vector has no sign.

    v_i is exact here, from the factors' SVD. PEFT's Arrow takes 15 power iterations from a random start,
    which end at another vector if the spectrum is flat, and it needs equal ranks and targets.
    """

    def logits(self, experts: Experts, x: Tensor, along: Tensor) -> Tensor:
        """`abs(v_1 . x)` of the 4 largest."""
        return keep_top(arrow_scores(experts, x) / TEMPERATURE, TOP_K)
