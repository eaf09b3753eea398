"""TIES, which decides entry by entry and so needs updates whole, and the way back to factors.

Yadav et al. 2023, TIES-Merging, arXiv 2306.01708, Algorithm 1, for the updates t of n adapters:

    trim    t_i keeps its k % largest entries by magnitude, the others become 0
    elect   g = sgn(sum_i t_i), entry by entry
    merge   m = mean of the t_i with sgn(t_i) = g, over those alone; times lambda

Two readings, for all that use it. Trimming is within one module, where the paper ranks the
entries of the whole model at once: one module of all adapters is all that is in memory. Where
the sum is exactly 0 no sign is elected and the entry is 0, as the formula says; the authors'
code falls back on the sign that most other entries have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from merge.factors import Factors, dense

# The paper's recipe where no validation data is at hand: k = 20 % and lambda = 1.
KEEP = 0.2
SCALE = 1.0


def stack(updates: Sequence[Factors]) -> Tensor:
    """The updates themselves, (n, d_out, d_in)."""
    return torch.stack([dense(update) for update in updates])


def to_factors(update: Tensor) -> Factors:
    """A dense update as factors: itself beside the identity, rank = the smaller of its widths.

    Exact, also in half precision, and without the SVD that a smaller rank would take; TIES leaves
    updates of full rank anyway.
    """
    d_out, d_in = update.shape
    identity = torch.eye(min(d_out, d_in), dtype=update.dtype)
    return Factors(update, identity) if d_out < d_in else Factors(identity, update)


def trim(updates: Tensor, keep: float) -> Tensor:
    """Sets all but the largest entries of each update to 0.

    Args:
        updates: (n, d_out, d_in).
        keep: the share of entries that stay; entries as large as the smallest of them stay too.
    """
    sizes = updates.abs().flatten(1)  # (n, d_out * d_in)
    entries = sizes.shape[1]
    if not entries:
        return updates
    kept = max(1, round(keep * entries))
    least = sizes.kthvalue(entries - kept + 1, dim=1).values
    return torch.where(updates.abs() >= least[:, None, None], updates, 0.0)


def elect(updates: Tensor) -> Tensor:
    """The sign of each entry's sum over the updates: -1, 0 or 1, (d_out, d_in)."""
    return updates.sum(0).sign()


def disjoint_mean(updates: Tensor, signs: Tensor) -> Tensor:
    """Each entry's mean over the updates that have the elected sign there; 0 where none has."""
    agree = updates.sign() == signs
    total = torch.where(agree, updates, 0.0).sum(0)
    return total / agree.sum(0).clamp(min=1)


def ties(updates: Tensor, keep: float = KEEP) -> Tensor:
    """Trims, elects signs and averages what agrees: (n, d_out, d_in) to (d_out, d_in)."""
    trimmed = trim(updates, keep)
    return SCALE * disjoint_mean(trimmed, elect(trimmed))
