"""Low-rank factors of one module's update, and the exact algebra on them.

An update is `D = B @ A` with every scale already folded in. Only `dense` ever forms `D`, for checks and
for the methods that need every entry. Notation: d_in and d_out are the module's widths, r is the rank.
All factors are float32 or wider, whatever the file held.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Where the largest singular value is 1, anything below this is rounding in float32 factors.
ROUNDING = 1e-6


class Factors(NamedTuple):
    """The update `b @ a` of one module.

    Example:
        >>> update = Factors(a=torch.ones(1, 3), b=torch.tensor([[1.0], [2.0]]))
        >>> update.rank
        1
        >>> dense(update)
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """

    a: Tensor  # (r, d_in)
    b: Tensor  # (d_out, r)

    @property
    def rank(self) -> int:
        """The number of columns of `b`; the update's true rank may be smaller."""
        return self.a.shape[-2]


def dense(update: Factors) -> Tensor:
    """The update itself, (d_out, d_in)."""
    return update.b @ update.a


def gram(updates: Sequence[Factors]) -> Tensor:
    """The Frobenius inner products of all pairs of updates of one module, (n, n) float64.

    Each update is multiplied by the factors of all updates at once, side by side, K columns in all.

    Example:
        >>> float(gram([Factors(torch.ones(1, 3), torch.ones(2, 1))]))  # of a 2 x 3 matrix of ones
        6.0
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

    Both factors are scaled by the root of the weight (the sign goes into `b`), so that neither loses
    precision when stored in half precision.

    Example:
        >>> one = Factors(torch.eye(2), torch.eye(2))
        >>> total = weighted_sum([one, one], [1.0, -0.25])
        >>> total.rank
        4
        >>> dense(total)
        tensor([[0.7500, 0.0000],
                [0.0000, 0.7500]])
    """
    roots = [abs(weight) ** 0.5 for weight in weights]
    signed = [root if weight >= 0 else -root for root, weight in zip(roots, weights, strict=True)]
    a = torch.cat([root * update.a for root, update in zip(roots, updates, strict=True)])
    b = torch.cat([root * update.b for root, update in zip(signed, updates, strict=True)], dim=1)
    return Factors(a, b)


def stacks(updates: Iterable[tuple[str, Factors]]) -> Iterator[tuple[list[str], Factors]]:
    """Stacks updates of equal shape and rank, for faster linear algebra, with their modules' names."""
    groups: dict[tuple[torch.Size, torch.Size], list[tuple[str, Factors]]] = {}
    for name, update in updates:
        groups.setdefault((update.a.shape, update.b.shape), []).append((name, update))
    for group in groups.values():
        names, factors = zip(*group, strict=True)
        yield list(names), Factors(*(torch.stack(parts) for parts in zip(*factors, strict=True)))


def svd(update: Factors, rank: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of an update or a stack of updates, by QR of both factors and an r x r SVD.

    Args:
        rank: keep this many of the largest singular values; None keeps all.

    Returns:
        u (..., d_out, k), s (..., k) descending, vh (..., k, d_in), with k = min(r, d_in, d_out, rank).
    """
    q_b, r_b = torch.linalg.qr(update.b)  # (..., d_out, k_b), (..., k_b, r)
    q_a, r_a = torch.linalg.qr(update.a.mT)  # (..., d_in, k_a), (..., k_a, r)
    u, s, vh = torch.linalg.svd(r_b @ r_a.mT, full_matrices=False)
    return q_b @ u[..., :rank], s[..., :rank], vh[..., :rank, :] @ q_a.mT


def support(update: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD in float64, cut to the update's numerical rank.

    Directions of singular value 0 are arbitrary, so a method that gives weight to singular vectors must
    not see them.

    Returns:
        u (d_out, k), s (k,) descending, vh (k, d_in), with k the numerical rank, 0 for a zero update.
    """
    u, s, vh = svd(Factors(update.a.double(), update.b.double()))
    real = s > ROUNDING * s[:1]
    return u[:, real], s[real], vh[real]


def from_svd(u: Tensor, s: Tensor, vh: Tensor) -> Factors:
    """The update `u @ diag(s) @ vh`, with the singular values split evenly between the factors."""
    root = s.sqrt()
    return Factors(root[:, None] * vh, u * root)


def recompress(update: Factors, rank: int) -> Factors:
    """The best approximation of at most the given rank (Eckart-Young), with singular values split evenly.

    Example:
        >>> update = Factors(torch.eye(2), torch.diag(torch.tensor([3.0, 1.0])))
        >>> dense(recompress(update, 1)).round(decimals=4).abs()
        tensor([[3., 0.],
                [0., 0.]])
    """
    return from_svd(*svd(update, rank))


def pad(update: Factors, rank: int) -> Factors:
    """The same update, padded with zero rows and columns to the given rank.

    Raises:
        ValueError: the update's rank is already larger.
    """
    extra = rank - update.rank
    if extra < 0:
        raise ValueError(f"cannot pad rank {update.rank} to {rank}")
    a = torch.nn.functional.pad(update.a, (0, 0, 0, extra))
    return Factors(a, torch.nn.functional.pad(update.b, (0, extra)))


def balanced(update: Factors) -> Factors:
    """The same update, with both factors of like size, for float16, which has few digits below 6e-5.

    What a direction has in one factor moves into the other by powers of two, so nothing is rounded.

    Example:
        >>> a, b = balanced(Factors(torch.tensor([[4.0, 8.0]]), torch.tensor([[2.0**-9]])))
        >>> a.tolist(), b.tolist()
        ([[0.0625, 0.125]], [[0.125]])
    """
    a, b = (factor.abs().amax(dim).log2() for factor, dim in ((update.a, 1), (update.b, 0)))  # (r,)
    shift = ((b - a) / 2).round().nan_to_num(0, 0, 0)
    return Factors(torch.ldexp(update.a, shift[:, None]), torch.ldexp(update.b, -shift))
