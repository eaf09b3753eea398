"""Our static merges beside those of public packages, on random low-rank updates.

`python scripts/docs/peers.py mergekit` (or `fusion-bench`) prints a table of Markdown for
docs/peers.md. Run it in an environment of the package's own: of ours it needs torch and numpy only.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
MODULE = "q_proj"  # goes into the seed of our random masks
SEEDS = 2000
# Ranks of the updates. The sum of FULL spans a module of 24 x 16, that of THIN does not.
FULL, THIN = (4, 4, 4, 4), (2, 3, 4)


class Row(NamedTuple):
    """One line of the table."""

    method: str
    function: str
    theirs: Tensor
    ours: Tensor
    note: str


def import_ours() -> None:
    """Makes `merge` and the methods' files importable without what the routers need.

    A static method's file takes nothing from `router` but the class that it subclasses.
    """
    base = type("Static", (), {})
    for name, base_name in (("router.pipeline", "Static"), ("router.kit", "Merges")):
        sys.modules[name] = stand_in = ModuleType(name)
        setattr(stand_in, base_name, base)
    sys.path.insert(0, str(ROOT))


def library(ranks: Sequence[int], d_out: int = 24, d_in: int = 16, size: float = 1.0) -> list[Any]:
    """One seeded update for each rank, as factors in float32."""
    from merge.factors import Factors

    generator = torch.Generator().manual_seed(sum(ranks) + d_out)
    return [
        Factors(
            torch.randn(rank, d_in, generator=generator),
            size * torch.randn(d_out, rank, generator=generator),
        )
        for rank in ranks
    ]


def whole(updates: Sequence[Any]) -> list[Tensor]:
    """The updates as matrices."""
    from merge.factors import dense

    return [dense(update) for update in updates]


def ours(name: str, updates: list[Any]) -> Tensor:
    """What our method makes of the updates of one module."""
    from router.methods import load_method

    method: Any = load_method(name)
    combiner = method.__new__(method)
    combiner.settings = SimpleNamespace(seed=0)
    (merged,) = whole([combiner.combine(MODULE, updates)])
    return merged


def thinned(updates: Sequence[Any], seed: int = 0) -> list[Tensor]:
    """Our DARE: entries dropped at random, the others rescaled."""
    from router.methods.dare_ties import thinned

    return [thinned(MODULE, update, seed) for update in updates]


def forced(masks: Sequence[Tensor], function: str) -> Any:
    """Lets a random function of torch return our masks, so that the same entries are dropped."""
    return patch(f"torch.{function}", side_effect=[mask.float() for mask in masks])


def mean_row(function: str, theirs: list[Tensor], update: Any) -> Row:
    """Both thinnings with masks of their own: the mean over many draws, which should be the update."""
    drawn = torch.stack(theirs), torch.cat([torch.stack(thinned([update], seed)) for seed in range(SEEDS)])
    (exact,) = whole([update])
    shares = [f"{float((draws == 0).double().mean()):.4f}" for draws in drawn]
    errors = [f"{float((draws.mean(0) - exact).abs().max() / exact.abs().max()):.3f}" for draws in drawn]
    note = (
        f"chance: masks of their own, mean of {SEEDS} draws. Share dropped: theirs {shares[0]}, ours "
        f"{shares[1]}. Mean against the update: theirs {errors[0]}, ours {errors[1]}"
    )
    return Row("DARE, thinning", function, drawn[0].mean(0), drawn[1].mean(0), note)


def mergekit() -> Iterator[Row]:
    """Task Arithmetic, TIES and DARE-TIES, of which mergekit makes one class."""
    from mergekit.merge_methods import merge_tensors
    from mergekit.sparsify import RescaleNorm, SparsificationMethod, sparsify

    from merge.dense import KEEP, ties
    from router.methods.dare_ties import DROP
    from router.methods.task_arithmetic import SCALE

    def merge(deltas: Sequence[Tensor], method: str, **settings: float) -> Tensor:
        tensors = [torch.zeros_like(deltas[0]), *deltas]
        found: Tensor = merge_tensors(tensors, method, base_index=0, parameters={"weight": 1.0, **settings})
        return found

    def thin(delta: Tensor, norm: RescaleNorm | None) -> Tensor:
        found: Tensor = sparsify(delta, 1 - DROP, SparsificationMethod.random, rescale_norm=norm)
        return found

    updates, even = library(FULL), library(FULL, d_out=20)
    deltas, masks = whole(updates), [one != 0 for one in thinned(updates)]
    call, sparse = '`merge_methods.merge_tensors("{}")`', "`sparsify.sparsify`"
    ties_name = call.format("ties")
    yield Row(
        "Task Arithmetic", call.format("task_arithmetic"),
        merge(deltas, "task_arithmetic", **{"lambda": SCALE}), ours("task_arithmetic", updates),
        "nothing at the same lambda",
    )  # fmt: skip
    yield Row(
        "TIES, 20 % of 320 entries", ties_name,
        merge(whole(even), "ties", density=KEEP), ours("ties", even), "nothing",
    )  # fmt: skip
    yield Row(
        "TIES, 20 % of 384 entries", ties_name,
        merge(deltas, "ties", density=KEEP), ours("ties", updates),
        "76.8 entries are to be kept: they keep 76, we 77",
    )  # fmt: skip
    yield Row(
        "TIES, 77 of 384 entries", ties_name,
        merge(deltas, "ties", density=77.5 / 384), ours("ties", updates), "nothing at the same count",
    )  # fmt: skip
    drawn = torch.tensor([[[1.0, 3.0, 2.0]], [[-1.0, -1.0, 2.0]]])
    yield Row(
        "TIES, a drawn vote", ties_name,
        merge(list(drawn), "ties", density=1.0), ties(drawn, keep=1.0),
        "where the sum is exactly 0 they elect plus, we nothing",
    )  # fmt: skip

    with forced(masks, "bernoulli"):
        plain = [thin(delta, None) / (1 - DROP) for delta in deltas]
    yield Row(
        "DARE, thinning", sparse, torch.stack(plain), torch.stack(thinned(updates)),
        "nothing with the same mask and their rescaling off, 1 / (1 - p) put in its place",
    )  # fmt: skip
    with forced(masks, "bernoulli"):
        rescaled = [thin(delta, RescaleNorm.l1) for delta in deltas]
    yield Row(
        "DARE, thinning", sparse, torch.stack(rescaled), torch.stack(thinned(updates)),
        "same mask; they rescale to the L1 norm from before, the paper and we by 1 / (1 - p)",
    )  # fmt: skip
    yield mean_row(sparse, [thin(deltas[0], RescaleNorm.l1) for _ in range(SEEDS)], updates[0])
    with forced(masks, "bernoulli"):
        both = merge(deltas, "dare_ties", density=1 - DROP)
    yield Row(
        "DARE-TIES", call.format("dare_ties"), both, ours("dare_ties", updates),
        "same masks; they do not trim after thinning and sum what agrees, where TIES takes the mean; "
        "and the rescaling above",
    )  # fmt: skip
    yield Row(
        "DARE-TIES", f"{sparse}, then {ties_name}",
        merge(plain, "ties", density=77.5 / 384), ours("dare_ties", updates),
        "nothing with the same masks, 1 / (1 - p) and all of TIES",
    )  # fmt: skip


def fusion_bench() -> Iterator[Row]:
    """All six."""
    from fusion_bench.method.dare.utils import param_random_drop_
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c
    from fusion_bench.method.knots.knots_utils import subspace_alignment
    from fusion_bench.method.task_arithmetic import TaskArithmeticAlgorithm
    from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    from fusion_bench.method.ties_merging.ties_merging_utils import ties_merging

    from merge.dense import KEEP, ties
    from router.methods.dare_ties import DROP
    from router.methods.task_arithmetic import SCALE

    def linear(weight: Tensor) -> torch.nn.Module:
        layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight.data = weight.clone()
        return layer

    def merge_ties(deltas: Sequence[Tensor], how: str = "mean", keep: float = KEEP) -> Tensor:
        flat = torch.stack([delta.flatten() for delta in deltas])
        found: Tensor = ties_merging(flat, reset_thresh=keep, merge_func=how)
        return found.view_as(deltas[0])

    def thin(delta: Tensor) -> Tensor:
        parameter = torch.nn.Parameter(delta.clone())
        param_random_drop_(parameter, DROP, rescale=True)
        return parameter.data

    updates, thinner, even = library(FULL), library(THIN), library(FULL, d_out=20)
    deltas, masks = whole(updates), [one != 0 for one in thinned(updates)]
    ties_name, thin_name = "`ties_merging_utils.ties_merging`", "`dare.utils.param_random_drop_`"
    pool = {"_pretrained_": linear(torch.zeros(24, 16))} | {
        str(n): linear(one) for n, one in enumerate(deltas)
    }
    summed = TaskArithmeticAlgorithm(scaling_factor=SCALE).run(pool)
    yield Row(
        "Task Arithmetic", "`task_arithmetic.TaskArithmeticAlgorithm`", summed.weight.data,
        ours("task_arithmetic", updates), "nothing at the same lambda (their configuration: 0.3)",
    )  # fmt: skip
    yield Row(
        "TIES, 20 % of 384 entries", ties_name, merge_ties(deltas), ours("ties", updates),
        'nothing with `merge_func="mean"`, as in the paper, and lambda = 1',
    )  # fmt: skip
    yield Row(
        "TIES, 20 % of 320 entries", ties_name, merge_ties(whole(even)), ours("ties", even),
        "they keep one entry more than the share says: 65, we 64 (of 384: 77 both)",
    )  # fmt: skip
    yield Row(
        "TIES, 20 % of 384 entries", f"{ties_name} as configured", 0.3 * merge_ties(deltas, "sum"),
        ours("ties", updates), "they sum what agrees, times 0.3; the paper and we take the mean, times 1",
    )  # fmt: skip
    drawn = torch.tensor([[[1.0, 3.0, 2.0]], [[-1.0, -1.0, 2.0]]])
    yield Row(
        "TIES, a drawn vote", ties_name, merge_ties(list(drawn), keep=0.99), ties(drawn, keep=1.0),
        "where the sum is exactly 0 they elect the sign that most entries have, we nothing",
    )  # fmt: skip
    larger = library(FULL, size=1.5)
    model = [torch.cat(pair) for pair in zip(deltas, whole(larger), strict=True)]
    yield Row(
        "TIES, two modules", ties_name, merge_ties(model),
        torch.cat([ours("ties", updates), ours("ties", larger)]),
        "they trim over the whole model, we within a module; here one module is 1.5 times the other",
    )  # fmt: skip
    with forced(masks, "rand_like"):
        parts = [thin(delta) for delta in deltas]
    yield Row(
        "DARE, thinning", thin_name, torch.stack(parts), torch.stack(thinned(updates)),
        "nothing with the same mask",
    )  # fmt: skip
    yield mean_row(thin_name, [thin(deltas[0]) for _ in range(SEEDS)], updates[0])
    yield Row(
        "DARE-TIES", f"{thin_name}, then {ties_name}, as in `dare.ties_merging.DareTiesMerging`",
        merge_ties(parts), ours("dare_ties", updates),
        'nothing with the same masks and `merge_func="mean"`; their configuration drops half and sums',
    )  # fmt: skip
    for name, some, note in [
        ("KnOTS-TIES", updates, "put together from their parts, since they have the basis only; TIES keeps "
         "one entry more: 52 of 256 coordinates, we 51"),
        ("KnOTS-TIES, thin", thinner, "nothing: ranks 2, 3, 4 give 144 coordinates, of which both keep 29"),
    ]:  # fmt: skip
        u, s, vhs = subspace_alignment(whole(some))
        merged = u @ merge_ties([s[:, None] * vh for vh in vhs])
        parts_used = f"`knots_utils.subspace_alignment`, then {ties_name}"
        yield Row(name, parts_used, merged, ours("knots", some), note)
    for name, some, note in [
        ("TSV-Merge", updates, "nothing where each update has the rank of its share, 16 / 4"),
        ("TSV-Merge, thin", thinner, "ranks 2, 3, 4, share 5: they fill it up with directions of singular "
         "value 0, which take room in the orthogonalisation; we leave those out"),
    ]:  # fmt: skip
        theirs = compute_and_sum_svd_mem_reduction([{"m": one} for one in whole(some)], accelerator="cpu")
        yield Row(
            name, "`TSVM_utils.compute_and_sum_svd_mem_reduction`", theirs["m"], ours("tsv", some), note
        )
    for name, some, note in [
        ("Iso-C", updates, "nothing where the sum has full rank, 16"),
        ("Iso-C, thin", thinner, "the sum has rank 9: they spread its nuclear norm over 16 directions, "
         "7 of them the SVD's filling, we over the 9 that it has"),
    ]:  # fmt: skip
        theirs = iso_c([{"m": one} for one in whole(some)], accelerator="cpu")
        yield Row(name, "`isotropic_merging.iso_utils.iso_c`", theirs["m"], ours("iso_c", some), note)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    packages = {"mergekit": mergekit, "fusion-bench": fusion_bench}
    parser.add_argument("package", choices=packages)
    name = parser.parse_args().package
    import_ours()
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # fusion-bench tells what it does
        rows = list(packages[name]())
    print(f"{name} {version(name)}, torch {version('torch')}\n")
    print("| method | their function | difference | what differs |\n| --- | --- | ---: | --- |")
    for row in rows:
        difference = float((row.theirs - row.ours).abs().max() / row.theirs.abs().max())
        print(f"| {row.method} | {row.function} | {difference:.1e} | {row.note} |")


if __name__ == "__main__":
    main()
