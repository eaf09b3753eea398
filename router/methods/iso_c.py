"""`iso_c`: one static merge, the sum of all adapters' updates with a flat spectrum."""

from merge.factors import Factors, from_svd, support, weighted_sum
from router.pipeline.steps import Static

# The paper tunes alpha on validation data. 1 keeps the sum's nuclear norm, and is FusionBench's default for
# this method.
SCALE = 1.0


class IsoC(Static):
    """Marczak et al. 2025, No Task Left Behind, arXiv 2502.04959, Iso-C, section 4.

    With `sum_i D_i = U S V^T`, the merged update is `alpha * mean(S) * U V^T`. The paper's updates have full
    rank. Here U, S and V hold only the directions that the sum has, since an SVD fills up the others
    arbitrarily. Recompression (`--variant_rank`) has to choose among equal singular values, so its cut is
    arbitrary.
    """

    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """Iso-C on the factors of the sum."""
        u, s, vh = support(weighted_sum(updates, [1.0] * len(updates)))
        flat = s.sum() / max(1, len(s))
        return from_svd(u, SCALE * flat.expand(len(s)), vh)
