"""What each choice of the gate is worth: `python -m scripts.ablate > docs/ablations.md`.

One pass over the labelled queries measures several statistics at once, then the adapters that come near
the best are tried; the rest is arithmetic. Reports routing accuracy over the queries that have an
adapter, and how many of those without one are left to the base model. Reads labels, so nothing routes by it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from router import gate as gate_module
from router.adapters import load_library
from router.base import EMBEDDED, load_base
from router.calibration import EVERY, Calibration, generic_prompts
from router.gate import PrototypeGate, Trials
from router.passes import batches, forward
from router.predict import encode
from router.probe import counted_tokens, hooked, last_of
from router.prototypes import ModulePrototypes, prototypes
from router.submission import read_rows
from router.trial import trial

Array = NDArray[np.float64]
SETS = ("eval", "eval_unseen")
WEIGHTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "first direction": lambda share: (share == share.max()).float(),
    "equal": torch.ones_like,
    "S": lambda share: share,
    "S^2": torch.square,
}
POOLS = ("mean", "mean of squares", "peak", "last token", "second half", "mean norm", "mean, not centred")
FAR = 3.0  # how far behind the best an adapter is tried here, for the rows with another REACH


def weightings(proto: ModulePrototypes, n: int) -> dict[str, torch.Tensor]:
    """Each weighting of a module's directions, (K, n): a direction's weight in its adapter's column."""
    out = {name: torch.zeros(len(proto.owners), n) for name in WEIGHTS}
    for owner in proto.owners.unique().tolist():
        mine = proto.owners == owner
        for name, rule in WEIGHTS.items():
            weights = rule(proto.weights[mine])
            out[name][mine, owner] = weights / weights.sum()
    return out


def pooled(value: torch.Tensor, owner: torch.Tensor, tokens: torch.Tensor, pool: str) -> torch.Tensor:
    """One number per prompt and adapter, (B, n).

    Args:
        value: (T', n) of each counted token.
        owner: (T',) which prompt a token is in, in order.
        tokens: (B,) counted tokens of each prompt.
        pool: one of POOLS.
    """
    ends = tokens.cumsum(0)
    if pool == "last token":
        return value[ends - 1]
    zero = torch.zeros(len(tokens), value.shape[1])
    if pool == "peak":
        return zero.scatter_reduce_(0, owner[:, None].expand_as(value), value, "amax")
    if pool == "second half":
        place = torch.arange(len(value)) - (ends - tokens)[owner]
        late = place >= tokens[owner] // 2
        value, owner = value[late], owner[late]
        tokens = torch.bincount(owner, minlength=len(tokens))
    return zero.index_add_(0, owner, value) / tokens[:, None]


def measure(prompts: list[str]) -> tuple[list[str], dict[str, Array], list[str]]:
    """The adapters' names, by statistic the responses (prompts, adapters, modules), and the modules."""
    base, adapters = load_base(EMBEDDED), load_library(["data/library"])
    pad, n = base.tokenizer.pad_token_id, len(adapters)
    protos = prototypes(adapters, str(base.model.device), base.model.dtype)
    rows, means = encode(base.tokenizer, prompts), Calibration(base).means(list(protos))
    rules = {module: weightings(proto, n) for module, proto in protos.items()}
    kinds = [("S", pool) for pool in POOLS] + [(name, "mean") for name in WEIGHTS if name != "S"]
    out = {f"{w}, {p}": np.full((len(rows), n, len(protos)), np.nan, np.float32) for w, p in kinds}
    with torch.inference_mode():
        for numbers, ids, mask in batches(base.model, rows, pad, "measure"):
            counted = counted_tokens(mask)
            owner, tokens = counted.nonzero()[:, 0], counted.sum(1)

            def visit(
                module: str, x: torch.Tensor, numbers: list[int] = numbers, counted: torch.Tensor = counted,
                owner: torch.Tensor = owner, tokens: torch.Tensor = tokens,
            ) -> None:  # fmt: skip
                proto, m = protos[module], list(protos).index(module)
                raw = x[counted].float()
                seen = {}
                for name, inputs in (("raw", raw), ("centred", raw - means[module])):
                    along = (inputs.to(proto.directions.dtype) @ proto.directions).float().square()  # (T', K)
                    seen[name] = along, inputs.square().sum(1, keepdim=True).clamp_min(1e-12)
                for weight, pool in kinds:
                    along, size = seen["raw" if pool == "mean, not centred" else "centred"]
                    shares = along @ rules[module][weight]  # (T', n)
                    value = shares if pool == "mean of squares" else shares.sqrt()
                    if pool != "mean norm":
                        value = value / (size if pool == "mean of squares" else size.sqrt())
                    out[f"{weight}, {pool}"][numbers, :, m] = pooled(value, owner, tokens, pool).numpy()

            with hooked(base.model, list(protos), visit):
                forward(base.model, ids, mask)
    for m, proto in enumerate(protos.values()):
        absent = np.setdiff1d(np.arange(n), proto.owners.numpy())
        for values in out.values():
            values[:, absent, m] = np.nan
    names = [adapter.name for adapter in adapters]
    return names, {key: v.astype(np.float64) for key, v in out.items()}, list(protos)


def try_all(prompts: list[str], wanted: NDArray[np.bool_]) -> tuple[Trials, Trials]:
    """Trials on every fourth generic prompt and, where wanted, on the prompts."""
    base, adapters = load_base(EMBEDDED), load_library(["data/library"])
    rows = encode(base.tokenizer, prompts)
    reference = Calibration(base).trials(adapters, wanted)
    last = last_of(base.model, rows, base.tokenizer.pad_token_id)
    return reference, trial(base, adapters, rows, last, wanted)


def scores(
    X: Array, reference: Array, common: str = "one factor", last: bool = True, std: bool = True
) -> Array:
    """The gate's scores with parts of it changed or left out, (prompts, adapters)."""
    gate = PrototypeGate().fit(reference)
    if not std:
        gate.std_ = np.ones_like(gate.std_)
    if common == "mean":
        X, reference = (np.exp(_less_mean(np.log(x.clip(1e-6)), gate)) for x in (X, reference))
        gate.fit(reference)
    if common != "one factor":
        gate.loadings_ = np.zeros_like(gate.loadings_)
    raw = gate._average(np.log(reference.clip(1e-6)))
    gate.location_, gate.scale_ = raw.mean(0), raw.std(0, ddof=1) if last else np.ones(raw.shape[1])
    return gate.decision_function(X)


def _less_mean(logs: Array, gate: PrototypeGate) -> Array:
    """Log responses without what is the mean of all adapters' standardised ones."""
    z = (logs - gate.mean_) / gate.std_
    return np.asarray(gate.mean_ + gate.std_ * (z - np.nanmean(z, 1, keepdims=True)))


def by_groups(X: Array, reference: Array, groups: list[str]) -> Array:
    """Scores of each group of modules, and their mean, so that every group has one voice."""
    parts = []
    for group in sorted(set(groups)):
        mine = [m for m, g in enumerate(groups) if g == group]
        there = ~np.isnan(reference[0][:, mine]).all(1)
        part = np.full(X.shape[:2], np.nan)
        part[:, there] = scores(X[:, there][:, :, mine], reference[:, there][:, :, mine])
        parts.append(part)
    return np.asarray(np.nanmean(parts, 0))


def main() -> None:
    """Measures and prints the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    generic = generic_prompts()
    prompts, labels, sets, kinds = (
        list(generic),
        [""] * len(generic),
        [""] * len(generic),
        [""] * len(generic),
    )
    for name in SETS:
        for path in sorted(Path("data", name).glob("*.csv")):
            for _, row in read_rows(path, ("input", "adapter", "phrasing")):
                prompts.append(row["input"])
                labels.append(row["adapter"])
                sets.append(name)
                kinds.append(f"{path} {row['phrasing']}")
    names, found, modules = measure(prompts)
    n = len(generic)
    truth = np.array([names.index(label) if label in names else len(names) for label in labels])
    has = truth < len(names)
    chosen = {name: np.array([s == name for s in sets]) for name in SETS}

    def row(title: str, heaviest: NDArray[np.int64]) -> None:
        right = heaviest == truth
        cells = [f"{right[chosen[s] & has].mean():.3f}" for s in SETS]
        left = chosen["eval_unseen"] & ~has
        cells.append(f"{right[left].mean():.3f}" if (heaviest == len(names)).any() else "")
        print(f"| {title} | " + " | ".join(cells) + " |")

    def head(title: str) -> None:
        print(f"\n## {title}\n\n| gate | own phrasing | other phrasings | no adapter |")
        print("| --- | ---: | ---: | ---: |")

    X = found["S, mean"]
    reference = X[:n]
    plain = scores(X, reference)
    print("# What each choice of the gate is worth\n")
    print("Routing accuracy on `data/eval` (own phrasing) and `data/eval_unseen` (other phrasings), queries")
    print("that have an adapter; last, the share of queries without an adapter that go to the base model,")
    print(
        f"where it is a candidate. {len(names)} adapters, {n} generic prompts. Made by `scripts/ablate.py`."
    )
    head("Scores, among the adapters, without trials")
    row("**as it is**", plain.argmax(1))
    for key, values in found.items():
        if key != "S, mean":
            weight, pool = key.split(", ", 1)
            what = f"statistic: {pool}" if weight == "S" else f"directions weighted: {weight}"
            row(what, scores(values, values[:n]).argmax(1))
    row("no calibration: largest mean cosine", np.nanmean(X, 2).argmax(1))
    row("log-ratio to generic text, not divided by its spread", scores(X, reference, std=False).argmax(1))
    row("what adapters feel alike is left in", scores(X, reference, common="nothing").argmax(1))
    row("the adapters' mean is taken out", scores(X, reference, common="mean").argmax(1))
    row("module average not standardised again", scores(X, reference, last=False).argmax(1))
    kind = [module.rsplit(".", 1)[-1] for module in modules]
    depth = [int(module.split(".")[2]) for module in modules]
    third = [f"{3 * d // (max(depth) + 1)}" for d in depth]
    row("one voice for each kind of module", by_groups(X, reference, kind).argmax(1))
    row("one voice for each third of the depth", by_groups(X, reference, third).argmax(1))
    for share, what in ((1 / 3, "first third"), (2 / 3, "first two thirds")):
        mine = [m for m, d in enumerate(depth) if d < share * (max(depth) + 1)]
        row(f"the {what} of the layers alone", scores(X[:, :, mine], reference[:, :, mine]).argmax(1))
    spread = np.nanvar((np.log(X.clip(1e-6)) - PrototypeGate().fit(reference).mean_)[n:], 0)
    best = spread >= np.nanmedian(spread, 1, keepdims=True)
    row("each adapter's half of modules that separates the queries best",
        scores(np.where(best, X, np.nan), np.where(best, reference, np.nan)).argmax(1))  # fmt: skip
    for count in (16, 64, 128):
        row(f"{count} generic prompts", scores(X, reference[:: n // count][:count]).argmax(1))
    batch = X[n:]
    row("calibrated against the queries themselves", scores(X, batch).argmax(1))
    skew = np.concatenate([batch[truth[n:] == 0], batch[truth[n:] != 0][::20]])
    row("the same, most queries being from one task", scores(X, skew).argmax(1))
    together = plain.copy()
    for same in sorted(set(kinds[n:])):
        mine = np.array([k == same for k in kinds])
        together[mine] = plain[mine].mean(0)
    row("averaged over queries of one task and phrasing, by the labels", together.argmax(1))

    head("Trials, and the base model as a candidate")
    wanted = plain > plain.max(1, keepdims=True) - FAR
    wanted[:n] = False
    known, trials = try_all(prompts, wanted)

    def decide(
        reach: float = gate_module.REACH,
        most: int = gate_module.MOST,
        rise: float = 1.0,
        every: int = 1,
        change: str = "",
        S: Array = plain,
    ) -> NDArray[np.int64]:
        """The gate's choice with parts of it changed; the same arithmetic as in the package."""
        gate = PrototypeGate().fit(reference).fit_trials(Trials(*(part[::every] for part in known)))
        sure = (trials.confidence - gate.confidence_[0]) / gate.confidence_[1]
        effect = (np.log(trials.effect) - gate.effect_[0]) / gate.effect_[1]
        ranks = (-S).argsort(1, kind="stable").argsort(1)
        best = np.fmax(S.max(1, keepdims=True), gate.base_score_)
        sure = np.where((best - reach < S) & (ranks < most), sure, np.nan)
        bonus = rise * (sure if change == "falls too" else sure.clip(0, reach))
        if change == "effect too":
            bonus = bonus + effect.clip(0, reach)
        total = np.where(np.isnan(bonus), -np.inf, S + bonus)
        first, rows = total.argmax(1), np.arange(len(total))
        base_sure = (trials.base_confidence - gate.base_confidence_[0]) / gate.base_confidence_[1]
        level = total[rows, first] + base_sure - effect[rows, first]
        if change == "chance level only":
            level = np.full(len(total), -np.inf)
        return np.column_stack([total, np.fmax(gate.base_score_, level)]).argmax(1)

    row("no trials, the base model at the level of chance", PrototypeGate().fit(reference).predict(X))
    row("**as it is**", decide())
    for reach in (1.0, 2.0, FAR):
        row(f"adapters up to {reach:g} behind are tried", decide(reach))
    for most, what in ((1, "the best alone is tried"), (2, "two at most"), (n, "all in question are tried")):
        row(what, decide(most=most))
    for rise in (0.5, 0.75, 1.5, 2.0):
        row(f"a score rises by {rise:g} times the confidence", decide(rise=rise))
    row("a score also falls by low confidence", decide(change="falls too"))
    row("a score rises by the effect too", decide(change="effect too"))
    row("the base model at the level of chance alone", decide(change="chance level only"))
    for every in (2, 4):
        row(f"trials calibrated on {len(generic) // EVERY // every} generic prompts", decide(every=every))
    row("scores averaged as above, by the labels", decide(S=together))


if __name__ == "__main__":
    main()
