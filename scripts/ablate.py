"""What each choice of the gate is worth: `python -m scripts.ablate > docs/ablations.md`.

One pass over the labelled queries measures several statistics at once; the rest is arithmetic on
them. Reports routing accuracy over the queries that have an adapter: among the adapters alone, and
for the last rows with the base model as a candidate. Reads labels, so nothing routes by it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from router.adapters import load_library
from router.base import EMBEDDED, load_base
from router.calibration import generic_prompts
from router.constants import BASE_COLUMN
from router.gate import PrototypeGate
from router.passes import batches, forward
from router.predict import encode
from router.probe import counted_tokens, hooked, input_means
from router.prototypes import ModulePrototypes, prototypes
from router.submission import read_rows

Array = NDArray[np.float64]
SETS = ("eval", "eval_unseen")
WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "first direction": lambda share: (share == share.max()).float(),
    "equal": torch.ones_like,
    "S": lambda share: share,
    "S^2": torch.square,
}
POOLS = ("mean", "mean of squares", "peak", "last token", "mean norm")


def weightings(proto: ModulePrototypes) -> dict[str, torch.Tensor]:
    """Each weighting of a module's directions, (K,), summing to 1 within each adapter."""
    out = {name: torch.zeros_like(proto.weights) for name in WEIGHTS}
    for owner in proto.owners.unique():
        mine = proto.owners == owner
        for name, rule in WEIGHTS.items():
            weights = rule(proto.weights[mine])
            out[name][mine] = weights / weights.sum()
    return out


def measure(prompts: list[str], n_reference: int) -> tuple[list[str], dict[str, Array]]:
    """The adapters' names, and by statistic the responses (prompts, adapters, modules).

    The first `n_reference` prompts are the generic ones, with whose mean inputs are centred.
    """
    base, adapters = load_base(EMBEDDED), load_library(["data/library"])
    pad, n = base.tokenizer.pad_token_id, len(adapters)
    protos = prototypes(adapters, str(base.model.device), base.model.dtype)
    rows = encode(base.tokenizer, prompts)
    means = input_means(base.model, rows[:n_reference], pad, list(protos))
    rules = {module: weightings(proto) for module, proto in protos.items()}
    kinds = [("S", pool) for pool in POOLS] + [(name, "mean") for name in WEIGHTS if name != "S"]
    out = {f"{w}, {p}": np.full((len(rows), n, len(protos)), np.nan, np.float32) for w, p in kinds}
    with torch.inference_mode():
        for numbers, ids, mask in batches(base.model, rows, pad, "measure"):
            counted = counted_tokens(mask)
            owner = counted.nonzero()[:, 0]  # (T',)
            last = counted.sum(1).cumsum(0) - 1  # (B,) each prompt's last token among the counted

            def visit(
                module: str, x: torch.Tensor, numbers: list[int] = numbers, counted: torch.Tensor = counted,
                owner: torch.Tensor = owner, last: torch.Tensor = last,
            ) -> None:  # fmt: skip
                proto, m = protos[module], list(protos).index(module)
                x = x[counted].float() - means[module]
                size = x.square().sum(1, keepdim=True).clamp_min(1e-12)
                along = (x.to(proto.directions.dtype) @ proto.directions).float().square()  # (T', K)
                tokens = counted.sum(1, keepdim=True)  # (B, 1)
                for weight, pool in kinds:
                    shares = torch.zeros(len(x), n).index_add_(1, proto.owners, along * rules[module][weight])
                    value = shares if pool == "mean of squares" else shares.sqrt()
                    if pool != "mean norm":
                        value = value / (size if pool == "mean of squares" else size.sqrt())
                    zero = torch.zeros(len(numbers), n)
                    if pool == "peak":
                        pooled = zero.scatter_reduce_(0, owner[:, None].expand_as(value), value, "amax")
                    elif pool == "last token":
                        pooled = value[last]
                    else:
                        pooled = zero.index_add_(0, owner, value) / tokens
                    out[f"{weight}, {pool}"][numbers, :, m] = pooled.numpy()

            with hooked(base.model, list(protos), visit):
                forward(base.model, ids, mask)
    for m, proto in enumerate(protos.values()):
        absent = np.setdiff1d(np.arange(n), proto.owners.numpy())
        for values in out.values():
            values[:, absent, m] = np.nan
    return [adapter.name for adapter in adapters], {key: v.astype(np.float64) for key, v in out.items()}


def scores(
    X: Array, reference: Array, common: str = "random effects", last: bool = True, std: bool = True
) -> Array:
    """The gate's scores with parts of it changed or left out, (prompts, adapters)."""
    gate = PrototypeGate().fit(reference)
    if not std:
        gate.std_ = np.ones_like(gate.std_)
    if common != "random effects":
        gate.common_ = np.full_like(gate.common_, float(common == "full mean"))
    raw = gate._average(np.log(reference.clip(1e-6)))
    gate.location_, gate.scale_ = raw.mean(0), raw.std(0, ddof=1) if last else np.ones(raw.shape[1])
    return gate.decision_function(X)


def main() -> None:
    """Measures and prints the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    generic = generic_prompts()
    prompts, labels, sets = list(generic), [""] * len(generic), [""] * len(generic)
    for name in SETS:
        for path in sorted(Path("data", name).glob("*.csv")):
            for _, row in read_rows(path, ("input", "adapter")):
                if row["adapter"] != BASE_COLUMN:
                    prompts.append(row["input"])
                    labels.append(row["adapter"])
                    sets.append(name)
    names, found = measure(prompts, len(generic))
    n, truth = len(generic), np.array([names.index(label) if label else -1 for label in labels])
    chosen = {name: np.array([s == name for s in sets]) for name in SETS}

    def row(title: str, heaviest: NDArray[np.int64]) -> None:
        accuracy = [float((heaviest[chosen[s]] == truth[chosen[s]]).mean()) for s in SETS]
        print(f"| {title} | " + " | ".join(f"{value:.3f}" for value in accuracy) + " |")

    print("# What each choice of the gate is worth\n")
    print("Routing accuracy on `data/eval` (own phrasing) and `data/eval_unseen` (other phrasings), queries")
    print(f"that have an adapter, {len(names)} adapters, {n} generic prompts. Made by `scripts/ablate.py`.\n")
    print("| gate | own phrasing | other phrasings |\n| --- | ---: | ---: |")
    X = found["S, mean"]
    row("**as it is, among the adapters**", scores(X, X[:n]).argmax(1))
    for key, values in found.items():
        if key != "S, mean":
            weight, pool = key.split(", ")
            what = f"statistic: {pool}" if weight == "S" else f"directions weighted: {weight}"
            row(what, scores(values, values[:n]).argmax(1))
    row("no calibration: largest mean cosine", np.nanmean(X, 2).argmax(1))
    row("log-ratio to generic text, not divided by its spread", scores(X, X[:n], std=False).argmax(1))
    row("what adapters feel alike is left in", scores(X, X[:n], common="none").argmax(1))
    row("adapters' full mean is taken out", scores(X, X[:n], common="full mean").argmax(1))
    row("module average not standardised again", scores(X, X[:n], last=False).argmax(1))
    for count in (16, 64, 128):
        row(f"{count} generic prompts", scores(X, X[:n][:: n // count][:count]).argmax(1))
    batch = X[n:]
    row("calibrated against the queries themselves", scores(X, batch).argmax(1))
    skew = np.concatenate([batch[truth[n:] == 0], batch[truth[n:] != 0][::20]])
    row("the same, most queries being from one task", scores(X, skew).argmax(1))
    row("**as it is, with the base model as a candidate**", PrototypeGate().fit(X[:n]).predict(X))


if __name__ == "__main__":
    main()
