"""`dare_ties`: one static merge, TIES on updates that were thinned at random and rescaled."""

from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

from merge.dense import ties, to_factors
from merge.factors import Factors, dense
from router.merges import Static

# The authors' own command for merging decoders with DARE (yule-BUAA/MergeLM, README). Their 0.9 is
# for one model kept apart; at that rate a merge needs a lambda tuned on validation data.
DROP = 0.2


def thinned(module: str, update: Factors, seed: int) -> Tensor:
    """DARE: each entry is dropped with probability DROP, the others are divided by 1 - DROP.

    The mean over seeds is the update. The mask follows from the seed, the module and the adapter's
    own numbers, so neither the order of the adapters nor which others there are changes it.
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

    `m_i ~ Bernoulli(p)`, `D_i' = (1 - m_i) * D_i / (1 - p)`, then all of TIES, its trimming included,
    as in the authors' code: formula and hyperparameters are in `merge.dense`.
    """

    def combine(self, module: str, updates: list[Factors]) -> Factors:
        """TIES on the thinned dense updates."""
        return to_factors(
            ties(torch.stack([thinned(module, update, self.settings.seed) for update in updates]))
        )
