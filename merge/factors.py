"""Low-rank factors of one module's update, and the exact algebra on them.

An update is `D = B @ A` with every scale already folded in. Nothing here ever forms `D`, except
`dense`, for checks and for the methods that need every entry. Notation: d_in and d_out are the
module's widths, r the rank; all factors are float32 or better, whatever the file held.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Beside a largest singular value of 1, less than this is rounding in float32 factors.
ROUNDING = 1e-6


class Factors(NamedTuple):
    """The update `b @ a` of one module."""

    a: Tensor  # (r, d_in)
    b: Tensor  # (d_out, r)

    @property
    def rank(self) -> int:
        """The number of columns of `b`; the update's true rank may be smaller."""
        return self.a.shape[-2]


def dense(update: Factors) -> Tensor:
    """The update itself, (d_out, d_in)."""
    return update.b @ update.a


def inner(one: Factors, other: Factors) -> float:
    """The Frobenius inner product of two updates of one module, from `r x r` matrices in float64."""
    a = one.a.double() @ other.a.double().T  # (r, r')
    b = one.b.double().T @ other.b.double()  # (r, r')
    return float((a * b).sum())


def gram(updates: Sequence[Factors]) -> Tensor:
    """The Frobenius inner products of all pairs of updates of one module, (n, n) float64.

    Each update meets all of them at once, their factors side by side, K columns in all.
    """
    a = torch.cat([update.a for update in updates]).double()  # (K, d_in)
    b = torch.cat([update.b for update in updates], dim=1).double()  # (d_out, K)
    owners = torch.repeat_interleave(torch.tensor([update.rank for update in updates]))  # (K,)
    rows = []
    for one in updates:
        columns = ((one.a.double() @ a.T) * (one.b.double().T @ b)).sum(0)  # (K,)
        rows.append(torch.bincount(owners, columns, len(updates)))
    return torch.stack(rows)


def weighted_sum(updates: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The exact sum of `weights[i] * updates[i]`: factors side by side, rank = sum of ranks.

    Each weight is shared between the two factors as its root (the sign goes into `b`), so that
    neither loses precision when stored in half precision.

    Raises:
        ValueError: no update, or not one weight per update.
    """
    if not updates or len(updates) != len(weights):
        raise ValueError(
            f"expected one weight per update, got {len(updates)} updates, {len(weights)} weights"
        )
    roots = [abs(weight) ** 0.5 for weight in weights]
    return Factors(
        torch.cat([root * update.a for root, update in zip(roots, updates, strict=True)], dim=0),
        torch.cat(
            [
                (root if weight >= 0 else -root) * update.b
                for root, weight, update in zip(roots, weights, updates, strict=True)
            ],
            dim=1,
        ),
    )


def stacks(updates: Iterable[tuple[str, Factors]]) -> Iterator[tuple[list[str], Factors]]:
    """Updates of one shape and rank stacked, with the modules' names; linear algebra is faster on a stack."""
    groups: dict[tuple[torch.Size, torch.Size], list[tuple[str, Factors]]] = {}
    for name, update in updates:
        groups.setdefault((update.a.shape, update.b.shape), []).append((name, update))
    for group in groups.values():
        names, found = zip(*group, strict=True)
        yield list(names), Factors(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def svd(update: Factors, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of the update by QR of both factors and an r x r SVD; of many at once if they are stacked.

    Args:
        rank: leave out all but this many of the largest singular values.

    Returns:
        u (..., d_out, k), s (..., k) descending, vh (..., k, d_in), with k = min(r, d_in, d_out, rank).
    """
    q_b, r_b = torch.linalg.qr(update.b)  # (..., d_out, k_b), (..., k_b, r)
    q_a, r_a = torch.linalg.qr(update.a.mT)  # (..., d_in, k_a), (..., k_a, r)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u[..., :rank], s[..., :rank], vh[..., :rank, :] @ q_a.mT


def support(update: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float64 without the directions that the update does not have.

    An SVD fills up directions of singular value 0 as it likes, so a method that gives weight to
    singular vectors must not see them.

    Returns:
        u (d_out, k), s (k,) descending, vh (k, d_in), with k the numerical rank, 0 for a zero update.
    """
    u, s, vh = svd(Factors(update.a.double(), update.b.double()))
    real = s > ROUNDING * s[:1]
    return u[:, real], s[real], vh[real]


def from_svd(u: Tensor, s: Tensor, vh: Tensor) -> Factors:
    """The update `u @ diag(s) @ vh`, singular values shared evenly between the factors."""
    root = s.sqrt()
    return Factors(root[:, None] * vh, u * root)


def recompress(update: Factors, rank: int) -> Factors:
    """The best approximation of at most the given rank (Eckart-Young), singular values shared evenly.

    Raises:
        ValueError: rank below 1.
    """
    if rank < 1:
        raise ValueError(f"expected a rank of at least 1, got {rank}")
    return from_svd(*svd(update, rank))


def pad(update: Factors, rank: int) -> Factors:
    """The same update with zero rows and columns up to the given rank.

    Raises:
        ValueError: the update's rank is already larger.
    """
    extra = rank - update.rank
    if extra < 0:
        raise ValueError(f"cannot pad rank {update.rank} to {rank}")
    a = torch.nn.functional.pad(update.a, (0, 0, 0, extra))
    return Factors(a, torch.nn.functional.pad(update.b, (0, extra)))
