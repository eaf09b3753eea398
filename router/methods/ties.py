"""`ties`: one static merge that trims, elects a sign per entry and averages what agrees."""

import torch

from merge.dense import ties, to_factors
from merge.factors import Factors, dense
from router.pipeline.steps import Static


class Ties(Static):
    """Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, Algorithm 1.

    The formula and hyperparameters (k = 20 %, lambda = 1) are in `merge.dense`. The method runs on the dense
    updates `s * B A`, not on A and B separately, and leaves an update of full rank.
    """

    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """TIES on the dense updates."""
        return to_factors(ties(torch.stack([dense(update) for update in updates])))
