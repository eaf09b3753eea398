"""`dare_ties`: one static merge, TIES on updates that were thinned at random and rescaled."""

from hashlib import sha256

import torch
from torch import Tensor

from merge.dense import ties, to_factors
from merge.factors import Factors, dense
from router.pipeline.steps import Static

# From the authors' own command for merging decoders with DARE (yule-BUAA/MergeLM, README). Their 0.9 is
# for a single model; at that rate a merge needs a lambda tuned on validation data.
DROP = 0.2


def thinned(module: str, update: Factors, seed: int) -> Tensor:
    """DARE: drops each entry with probability DROP and divides the others by 1 - DROP.

    The mean over seeds is the update. The mask depends only on the seed, the module and the adapter's own
    numbers. The order of the adapters does not change it, and neither do other adapters.
    """
    digest = sha256(f"{seed} {module} ".encode())
    for factor in update:
        digest.update(factor.numpy().tobytes())
    generator = torch.Generator().manual_seed(int.from_bytes(digest.digest()[:8], "big"))
    delta = dense(update)
    kept = torch.rand(delta.shape, generator=generator) >= DROP
    return delta * kept / (1 - DROP)


class DareTies(Static):
    """Yu et al. 2024, Language Models are Super Mario, arXiv 2311.03099, section 3, before TIES.

    `m_i ~ Bernoulli(p)`, `D_i' = (1 - m_i) * D_i / (1 - p)`, then all of TIES including its trimming, as in
    the authors' code. The formula and hyperparameters of TIES are in `merge.dense`.
    """

    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """TIES on the thinned dense updates."""
        return to_factors(
            ties(torch.stack([thinned(module, update, self.settings.seed) for update in updates]))
        )
