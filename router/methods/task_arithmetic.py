"""`task_arithmetic`: one static merge, the scaled sum of all adapters' updates."""

from merge.factors import Factors, weighted_sum
from router.pipeline.steps import Static

# Ilharco et al. tune it on validation data. Where there is none, the TIES paper (2306.01708) takes this value
# for Task Arithmetic, as its authors recommend.
SCALE = 0.4


class TaskArithmetic(Static):
    """Ilharco et al. 2023, Editing Models with Task Arithmetic, arXiv 2212.04089, section 2.

    `D = lambda * sum_i D_i`, exact on the factors. With lambda fixed, the merged update grows with
    the number of adapters.
    """

    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """The sum of all updates, each times SCALE."""
        return weighted_sum(updates, [SCALE] * len(updates))
