"""What each choice of the gate is worth, on every library that is at hand: `python -m scripts.docs.ablate`.

Writes docs/ablations.md, the curve docs/trade.svg, and the table of docs/method.md that tells how often a
weight is right. No constant is chosen by one library, so each row has the figures of all of them side by
side, and the worst. Every library is measured once; the rows are settings of the package's own gate. Reads
labels, so nothing that routes may import it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from router.constants import BASE_COLUMN
from router.files import replacing
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import load_base
from router.model.passes import truncated
from router.routing.calibration import Calibration
from router.routing.gate import SHARES, PrototypeGate
from router.routing.probe import AHEAD, END, _Responses, probe
from router.routing.prototypes import prototypes
from scripts.bench.development import SPLITS, Labelled, libraries
from scripts.bench.markdown import header, insert, row
from scripts.bench.score import routed
from scripts.docs.trials import TOKENS, Pair, Tried, tried

OUT, CURVE, METHOD = Path("docs/ablations.md"), Path("docs/trade.svg"), Path("docs/method.md")
FITS, NOBODY = SPLITS[:3], SPLITS[3:]  # an adapter is right, or the base model
WEIGHTS = (0.0, 0.5, 0.7, 0.85, 0.95, 1.0)  # bounds of the reliability table
SEVERAL, CLOSE = 3, 2.0  # candidates that write, and how far below the best one they may be
OTHERS = 4  # generic prompts
POWERS = (1, 4)  # of the cosines of tokens, whose mean a response would be the root of
# Three kinds of foreign text, by the start of their names in data/eval_foreign.
KINDS = {
    "chat": ("chat_question", "small_talk"), "few-shot": ("few_shot",), "multiple choice": ("mc_",)
}  # fmt: skip
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """The responses of a library to generic text and to labelled queries.

    Attributes:
        name: of the library.
        candidates: adapters, and the base model last.
        modules: names of the modules.
        reference, responses: of generic prompts and of queries, (prompts, adapters, modules, 2).
        reference_confidence, confidence: of the base model on them, (prompts,).
        unwritten: the same two arrays of responses without what the base model writes.
        powered: these two with the mean of another power of the tokens' cosines, by the power.
        tried: of a query and an adapter, where several are above the base model and close: what it writes.
        labels: the adapter of each query, `base` where none fits.
        splits: of each query, one of SPLITS.
        tasks: of each query.
    """

    name: str
    candidates: list[str]
    modules: list[str]
    reference: Any
    reference_confidence: Any
    responses: Any
    confidence: Any
    unwritten: tuple[Any, Any]
    powered: dict[int, tuple[Any, Any]]
    tried: dict[Pair, Tried]
    labels: list[str]
    splits: NDArray[np.str_]
    tasks: NDArray[np.str_]

    def right(self, top: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which choices are the right ones."""
        pairs = zip(top.tolist(), self.labels, strict=True)
        return np.array([routed(self.candidates[k], label) for k, label in pairs])

    def shares(self, top: NDArray[np.int64]) -> list[float]:
        """The share of right choices in each split; NaN where the library has no such queries."""
        right = self.right(top)
        found = (right[self.splits == split] for split in SPLITS)
        return [float(part.mean()) if len(part) else np.nan for part in found]

    def fitted(self, **settings: Any) -> PrototypeGate:
        """A gate with some settings."""
        return PrototypeGate(**settings).fit(self.reference, confidence=self.reference_confidence)


def measured(of: Labelled) -> Measured:
    """Measures a library in one pass of its base model."""
    base, adapters = load_base(of.base, "cpu", "float32"), load_library([str(of.adapters)])
    protos, calibration = prototypes(adapters, dtype=base.model.dtype), Calibration(base)
    means = calibration.means(list(protos))
    rows, pad = truncated(encode(base.tokenizer, of.rows["input"].tolist())), base.tokenizer.pad_token_id
    reading = partial(probe, base.model, prototypes=protos, means=means, n_adapters=len(adapters), pad_id=pad)
    powered = {}
    for power in POWERS:
        with _power(power):
            powers = (reading(rows=some).responses ** (2 / power) for some in (calibration.rows, rows))
            powered[power] = next(powers), next(powers)
    found = Measured(
        of.name,
        [*(adapter.name for adapter in adapters), BASE_COLUMN],
        list(protos),
        calibration.responses(adapters, protos, means),
        calibration.confidence(),
        *reading(rows=rows, title=of.name),
        (reading(rows=calibration.rows, ahead=0).responses, reading(rows=rows, ahead=0).responses),
        powered,
        {},
        of.rows["adapter"].tolist(),
        of.rows["split"].to_numpy(str),
        of.rows["task"].to_numpy(str),
    )
    others = calibration.rows[:: len(calibration.rows) // OTHERS]
    return replace(found, tried=tried(base, adapters, rows, others, close(found)))


def _power(power: int) -> AbstractContextManager[object]:
    """Inside the block, the probe takes the root of the mean of another power of the cosines than the square.

    It takes the square root of the mean, so the rest is left to the caller.
    """

    class Powered(_Responses):
        def _squares(self, *args: Any) -> Tensor:
            return super()._squares(*args) ** (power / 2)

    return patch("router.routing.probe._Responses", Powered)


def close(of: Measured) -> list[Pair]:
    """Queries that an adapter fits, each with the adapters above the base model that are near the best."""
    compared = _compared(of)  # (queries, candidates)
    floor = np.maximum(compared[:, -1], compared.max(1) - CLOSE)  # the lowest that is close
    found = []
    for q in np.flatnonzero(np.isin(of.splits, FITS)).tolist():
        best = np.argsort(-compared[q, :-1])[:SEVERAL]
        near = [int(k) for k in best if compared[q, k] > floor[q]]
        found += [(q, k) for k in near if len(near) > 1]
    return found


def _compared(of: Measured) -> Array:
    """What the choice is made by, the base model last, (queries, candidates)."""
    gate = of.fitted()
    return gate.candidate_scores(gate.decision_function(of.responses), of.confidence)


def scores(of: Measured, keep: Any = slice(None), prompts: Any = slice(None), **settings: Any) -> Array:
    """The scores of a gate with other settings, on some modules, fitted to some generic prompts."""
    gate = PrototypeGate(**settings).fit(of.reference[prompts][:, :, keep])
    return gate.decision_function(of.responses[:, :, keep])


def filtered(of: Measured, weigh: Callable[[PrototypeGate], Array]) -> Array:
    """The scores of a gate with another filter."""
    gate = PrototypeGate().fit(of.reference)
    gate.filter_ = np.where(np.isnan(gate.filter_), np.nan, weigh(gate))
    known, found = gate.decision_function(of.reference), gate.decision_function(of.responses)
    return np.asarray((found - known.mean(0)) / known.std(0, ddof=1))


# Weights of modules and views, (adapters, modules, views).
FILTERS: dict[str, Callable[[PrototypeGate], Array]] = {
    "equal weights": lambda gate: np.ones(2),
    "equal weights, half for the end and what is written": lambda gate: np.array([1, 0.5]),
    "1 / std": lambda gate: 1 / gate.std_,
    "1 / R^2": lambda gate: np.exp(-2 * gate.mean_),
    "as it is, the whole prompt alone": lambda gate: gate.filter_ * [1, 0],
    "as it is, the end and what is written alone": lambda gate: gate.filter_ * [0, 1],
}


# Responses in place of those of the probe as it is, of generic prompts and of queries.
INSTEAD: dict[str, Callable[[Measured], tuple[Any, Any]]] = {
    "without what the base model writes": lambda of: of.unwritten,
    "tokens by the mean of their cosines": lambda of: of.powered[1],
    "tokens by the mean of their cosines' power of 4": lambda of: of.powered[4],
}


def early(of: Measured, share: float) -> NDArray[np.bool_]:
    """Which modules are in the first layers."""
    depth = np.array([int(module.split(".")[2]) for module in of.modules])
    return np.asarray(depth < share * (depth.max() + 1))


Choose = Callable[[Measured], NDArray[np.int64]]


def side_by_side(found: Sequence[Measured], rows: dict[str, Choose], splits: Sequence[str]) -> list[str]:
    """A table with a cell for each library and split, and the worst library of each split.

    Splits that no library has are left out.
    """
    chosen = {title: np.array([of.shares(choose(of)) for of in found]) for title, choose in rows.items()}
    first = next(iter(chosen.values()))  # (libraries, SPLITS)
    places = [k for k, split in enumerate(SPLITS) if split in splits and not np.isnan(first[:, k]).all()]
    cells = [(n, k) for k in places for n in range(len(found)) if not np.isnan(first[n, k])]
    names = [f"{SPLITS[k]}: {found[n].name}" for n, k in cells] + [f"{SPLITS[k]}: worst" for k in places]
    lines = header(["gate", *names])
    for title, shares in chosen.items():
        worst = (np.nanmin(shares[:, k]) for k in places)
        lines.append(row(title, *(f"{v:.3f}" for v in (*(shares[cell] for cell in cells), *worst))))
    return lines


def which(found: Sequence[Measured]) -> list[str]:
    """Which adapter: the highest score, whatever the level."""
    rows: dict[str, Choose] = {
        "**as it is**": _highest,
        **{f"filter: {name}": partial(_highest_filtered, weigh=weigh) for name, weigh in FILTERS.items()},
        **{name: partial(_highest_other, found=found) for name, found in INSTEAD.items()},
        "no calibration: largest mean response": lambda of: np.nanmean(of.responses[..., 0], 2).argmax(1),
        "only the first third of the layers": lambda of: scores(of, early(of, 1 / 3)).argmax(1),
        "only the first two thirds of the layers": lambda of: scores(of, early(of, 2 / 3)).argmax(1),
        "every 2nd generic prompt": partial(_highest, prompts=slice(None, None, 2)),
        "every 4th generic prompt": partial(_highest, prompts=slice(None, None, 4)),
    }
    return side_by_side(found, rows, FITS)


def fits(found: Sequence[Measured]) -> list[str]:
    """Whether any adapter fits: the level."""
    now = PrototypeGate().false_alarm
    rows: dict[str, Choose] = {
        **{
            f"false_alarm {share:g}" + (" **(as it is)**" if share == now else ""): partial(
                _decided, false_alarm=share
            )
            for share in SHARES
        },
        **{
            f"false_alarm {share:g}, {name}": partial(_other, found=found, false_alarm=share)
            for name, found in INSTEAD.items()
            for share in (0.1, now, 0.3)
        },
        "as it is, without the base model's confidence": lambda of: (
            PrototypeGate().fit(of.reference).predict(of.responses)
        ),
    }
    return side_by_side(found, rows, SPLITS)


def reaches(found: Sequence[Measured]) -> list[str]:
    """Which of several adapters above the base model: powers of the gate's reach."""
    rows: dict[str, Choose] = {
        "the same for all": partial(_reaching, power=0),
        "the root of what the filter predicts": partial(_reaching, power=0.5),
        "what the filter predicts **(as it is)**": partial(_reaching, power=1),
        "its power of 1.5": partial(_reaching, power=1.5),
    }
    return side_by_side(found, rows, FITS)


def written(found: Sequence[Measured]) -> list[str]:
    """Which of those above the base model: what they would write, in parts of a nat beside their scores."""
    kinds: dict[str, Callable[[Tried], float]] = {
        "how much likelier it is to the base model than after other prompts": lambda t: t.base - t.elsewhere,
        "how likely it is to the base model": lambda t: t.base,
        "how likely it is to the adapter": lambda t: t.own,
        "how much likelier to the adapter than to the base model": lambda t: t.own - t.base,
    }
    rows: dict[str, Choose] = {
        "nothing **(as it is)**": _decided,
        **{
            f"{share:g} of {name}": partial(_told, share=share, kind=kind)
            for name, kind in kinds.items()
            for share in (0.02, 0.03, 0.05)
        },
    }
    counts = ", ".join(f"{of.name} {len(of.tried) / np.isin(of.splits, FITS).sum():.2f}" for of in found)
    return [*side_by_side(found, rows, FITS), "", f"Passes for each query: {counts}."]


def _told(of: Measured, share: float, kind: Callable[[Tried], float]) -> NDArray[np.int64]:
    top, compared = _decided(of).copy(), _compared(of)
    best = dict.fromkeys((q for q, _ in of.tried), -np.inf)
    for (q, k), seen in of.tried.items():
        if (value := compared[q, k] + share * kind(seen)) > best[q]:
            best[q], top[q] = value, k
    return top


def _reaching(of: Measured, power: float) -> NDArray[np.int64]:
    gate = of.fitted()
    gate.reach_ = gate.reach_**power
    return gate.predict(of.responses, of.confidence)


def _highest(of: Measured, **settings: Any) -> NDArray[np.int64]:
    return np.asarray(scores(of, **settings).argmax(1))


def _highest_filtered(of: Measured, weigh: Callable[[PrototypeGate], Array]) -> NDArray[np.int64]:
    return np.asarray(filtered(of, weigh).argmax(1))


def _decided(of: Measured, **settings: Any) -> NDArray[np.int64]:
    return of.fitted(**settings).predict(of.responses, of.confidence)


def _other(of: Measured, found: Callable[[Measured], tuple[Any, Any]], **settings: Any) -> NDArray[np.int64]:
    """The choices by other responses, of generic prompts and of queries."""
    reference, responses = found(of)
    gate = PrototypeGate(**settings).fit(reference, confidence=of.reference_confidence)
    return gate.predict(responses, of.confidence)


def _highest_other(of: Measured, found: Callable[[Measured], tuple[Any, Any]]) -> NDArray[np.int64]:
    reference, responses = found(of)
    return np.asarray(PrototypeGate().fit(reference).decision_function(responses).argmax(1))


def promised(found: Sequence[Measured]) -> list[str]:
    """The rate of false alarms that the level promises on generic text against what other text gets."""
    kinds: dict[str, Callable[[Measured], NDArray[np.bool_]]] = {
        **{kind: partial(_of_kinds, names=names) for kind, names in KINDS.items()},
        "all foreign queries": lambda of: of.splits == "foreign",
        "tasks without an adapter": lambda of: of.splits == "none",
    }
    cells = [(of, kind) for kind in kinds for of in found if kinds[kind](of).any()]
    lines = header(["promised", *(f"{kind}: {of.name}" for of, kind in cells)])
    sent = {
        (of.name, share): _decided(of, false_alarm=share) < len(of.candidates) - 1
        for of in found
        for share in SHARES
    }
    for share in SHARES:
        rates = (sent[of.name, share][kinds[kind](of)].mean() for of, kind in cells)
        lines.append(row(f"{share:g}", *(f"{rate:.3f}" for rate in rates)))
    return lines


def _of_kinds(of: Measured, names: Iterable[str]) -> NDArray[np.bool_]:
    """Which queries are of a kind of foreign text."""
    return np.array(
        [
            split == "foreign" and task.startswith(tuple(names))
            for split, task in zip(of.splits, of.tasks, strict=True)
        ]
    )


def reliability(found: Sequence[Measured], **settings: Any) -> list[str]:
    """How often the top candidate is right, by its weight; each split of a library counts the same."""
    spans = [f"{low:g} to {high:g}" for low, high in pairwise(WEIGHTS)]
    lines = header(["library", *spans, "mean gap"])
    for of in found:
        gate = of.fitted(**settings)
        weights = gate.predict_proba(of.responses, of.confidence)
        top, right = weights.max(1), of.right(weights.argmax(1))
        _, split, sizes = np.unique(of.splits, return_inverse=True, return_counts=True)
        counts = 1 / sizes[split] / len(sizes)  # (queries,) sum to 1
        place = np.digitize(top, WEIGHTS[1:-1])
        cells, gap = [], 0.0
        for n in range(len(spans)):
            own = place == n
            if not own.any():
                cells.append("")
                continue
            said, came = (float((counts * x)[own].sum() / counts[own].sum()) for x in (top, right))
            gap += float(counts[own].sum()) * abs(said - came)
            cells.append(f"{said:.2f}: {came:.2f}")
        lines.append(row(of.name, *cells, f"{gap:.3f}"))
    return lines


def temperatures(found: Sequence[Measured]) -> list[str]:
    """How well a softmax of each temperature tells the probability of being right."""
    lines = header(["temperature", *(f"{of.name}: {what}" for of in found for what in ("mean gap", "nats"))])
    now = PrototypeGate().temperature
    for temperature in (0.1, 0.2, 0.35, 0.5, 0.7, 1.0):
        cells = []
        for of, line in zip(found, reliability(found, temperature=temperature)[2:], strict=True):
            gate = of.fitted(temperature=temperature, top_k=None)
            weights = gate.predict_proba(of.responses, of.confidence)
            names = np.array([name.split("~")[0] for name in of.candidates])
            own = np.array([names == label for label in of.labels])  # (queries, candidates)
            _, split, sizes = np.unique(of.splits, return_inverse=True, return_counts=True)
            logs = -np.log((weights * own).sum(1).clip(1e-6))
            nats = (logs / sizes[split] / len(sizes)).sum()
            cells += [line.rsplit("|", 2)[1].strip(), f"{nats:.3f}"]
        lines.append(row(f"{temperature:g}" + (" **(as it is)**" if temperature == now else ""), *cells))
    return lines


def page(found: Sequence[Measured]) -> list[str]:
    """The lines of docs/ablations.md."""
    names = ", ".join(f"{of.name} ({len(of.candidates) - 1})" for of in found)
    text = f"""# What each choice of the gate is worth

Shares of queries whose top candidate is the right one: as phrased in training (*own*), in other phrasings
(*unseen*), as multiple choice (*mc*), and where the base model is the right one: tasks that no adapter of the
library was made for (*none*), and queries of eleven kinds that no library was made for (*foreign*,
data/eval_foreign). The libraries, with their adapters: {names}.
`committed` is data/library. `second` was trained apart from it, on other tasks and data, and is not part of
this repository; CONTRIBUTING.md tells how to build the others. {len(found[0].reference)} generic prompts,
float32. Made by `python -m scripts.docs.ablate`.
"""
    lines = text.splitlines()
    sections = {
        "Which adapter: the highest score, whatever the level": which,
        "Does any adapter fit: the level": fits,
        "Which of those above the base model: reach": reaches,
        "Which of those above the base model: what they would write": written,
        "False alarms, promised and measured": promised,
        "The temperature: weights as probabilities": temperatures,
    }
    notes = {
        "Which of those above the base model: reach": (
            "What an adapter has above the base model is divided by its reach. Whether one is above it "
            "stays the same."
        ),
        "Which of those above the base model: what they would write": (
            f"At most {SEVERAL} adapters within {CLOSE:g} of the best write {TOKENS} tokens each. A share of "
            "the log-probability of what they write, in nats, is added to what the choice is made by. It "
            f"takes passes with adapters, which the gate does without. The other prompts are {OTHERS} "
            "generic ones."
        ),
        "False alarms, promised and measured": (
            "The level is set on generic text, by cross-validation. Here is what it lets through of text "
            "that it has not seen."
        ),
        "The temperature: weights as probabilities": (
            "The mean gap is that between the weight of the top candidate and how often it is right; nats "
            "are the mean negative log of the right candidate's weight. Each split of a library counts alike."
        ),
    }
    for title, section in sections.items():
        above = [notes[title], ""] if title in notes else []
        lines += ["", f"## {title}", "", *above, *section(found)]
    return [*lines, "", f"The end of a prompt is its last {END} tokens; the base model writes {AHEAD}.", ""]


def curve(found: Sequence[Measured]) -> None:
    """Draws queries rightly sent to an adapter against foreign ones sent to one, as the level moves."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "trade", "svg.fonttype": "none"}):
        figure = Figure(figsize=(6, 4.2))
        axes = figure.subplots()
        for of in found:
            gate = of.fitted()
            points = []
            for share in np.linspace(0.01, 0.9, 90):
                level = float(np.quantile(gate.reference_leads_, 1 - share))
                points.append(_sent(of, gate, level))
            x, y = np.array(points).T
            (line,) = axes.plot(x, y, label=of.name)
            axes.plot(*_sent(of, gate, gate.level_), "o", color=line.get_color())
        axes.set_xlabel("foreign queries sent to an adapter")
        axes.set_ylabel("queries sent to their own adapter")
        axes.set_xlim(0, 0.6)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
        figure.savefig(CURVE, format="svg", metadata={"Date": None}, bbox_inches="tight")


def _sent(of: Measured, gate: PrototypeGate, level: float) -> tuple[float, float]:
    """Shares of foreign queries and tasks sent to an adapter, and of other phrasings sent to their own."""
    gate = copy(gate)
    gate.level_ = level
    top = gate.predict(of.responses, of.confidence)
    foreign, unseen = np.isin(of.splits, NOBODY), np.isin(of.splits, ("unseen", "mc"))
    return float((top[foreign] < len(of.candidates) - 1).mean()), float(of.right(top)[unseen].mean())


def main() -> None:
    """Measures and writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    found = [measured(of) for of in libraries()]
    with replacing(OUT) as file:
        file.write("\n".join(page(found)))
    insert(METHOD, "reliability", reliability(found))
    curve(found)


if __name__ == "__main__":
    main()
