"""TIES on dense updates, since it decides entry by entry, and the way back to factors.

Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, Algorithm 1, for the updates t of n adapters:

    trim    t_i keeps its k % largest entries by magnitude, the others become 0
    elect   g = sgn(sum_i t_i), entry by entry
    merge   m = mean of the t_i with sgn(t_i) = g, over those alone; times lambda

Two choices hold for every method that uses it. Trimming ranks the entries of one module, where the
paper ranks those of the whole model at once: only one module of all adapters is in memory at a time.
Where the sum is exactly 0, no sign is elected and the entry becomes 0, as the formula says; the authors'
code falls back on the sign that most other entries have.
"""

import torch
from torch import Tensor

from merge.factors import Factors

# The paper's recipe without validation data: k = 20 % and lambda = 1.
KEEP = 0.2
SCALE = 1.0


def to_factors(update: Tensor) -> Factors:
    """Writes a dense update as factors: the update and an identity, with rank min(d_out, d_in).

    This is exact, even in half precision. A smaller rank would take an SVD, and TIES leaves updates of
    full rank anyway.
    """
    d_out, d_in = update.shape
    identity = torch.eye(min(d_out, d_in), dtype=update.dtype)
    return Factors(update, identity) if d_out < d_in else Factors(identity, update)


def trim(updates: Tensor, keep: float) -> Tensor:
    """Sets all but the largest entries of each update to 0.

    Args:
        updates: (n, d_out, d_in).
        keep: the share of entries that stay; entries equal in size to the smallest of these stay too.

    Example:
        >>> trim(torch.tensor([[[1.0, -5.0, 3.0, 2.0]]]), keep=0.5)
        tensor([[[ 0., -5.,  3.,  0.]]])
    """
    sizes = updates.abs().flatten(1)  # (n, d_out * d_in)
    entries = sizes.shape[1]
    if not entries:
        return updates
    kept = max(1, round(keep * entries))
    least = sizes.kthvalue(entries - kept + 1, dim=1).values
    return torch.where(updates.abs() >= least[:, None, None], updates, 0.0)


def disjoint_mean(updates: Tensor) -> Tensor:
    """Each entry's mean over the updates that have the sign of its sum, (d_out, d_in); 0 where none has.

    Example:
        >>> disjoint_mean(torch.tensor([[[2.0, 1.0]], [[4.0, -3.0]]]))
        tensor([[ 3., -3.]])
    """
    agree = updates.sign() == updates.sum(0).sign()
    total = torch.where(agree, updates, 0.0).sum(0)
    return total / agree.sum(0).clamp(min=1)


def ties(updates: Tensor) -> Tensor:
    """Trims, elects signs and averages what agrees: (n, d_out, d_in) to (d_out, d_in)."""
    return SCALE * disjoint_mean(trim(updates, KEEP))
