"""What each choice of the gate is worth: `python -m scripts.docs.ablate` writes docs/ablations.md.

No constant is chosen by the libraries that it is shown on. For each library, all constants are chosen by the
figures of the others, and its own figures are shown under that choice. Every library is measured once, in one
pass of its base model that is kept under output/benchmark/responses. Reads labels, so nothing that routes may
import it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from router.constants import BASE_COLUMN, Dtype
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import load_base
from router.model.passes import truncated
from router.routing import gate
from router.routing.calibration import Calibration
from router.routing.gate import SHARES, PrototypeGate
from router.routing.probe import probe
from router.routing.prototypes import prototypes
from scripts.bench.development import CHATS, FOREIGN, Labelled, libraries
from scripts.bench.development import FITS as EVERY
from scripts.bench.markdown import header, insert, row
from scripts.bench.score import routed

OUT, KEPT = Path("docs/ablations.md"), Path("output/benchmark/responses")
FITS, NOBODY = EVERY[:3], FOREIGN[:3]  # an adapter is right, or the base model; of prompts
DTYPES: dict[str, Dtype] = {"devset_c": "bfloat16"}  # the larger model
HARM = 0.05  # share of foreign queries that are sent to an adapter, where methods are compared
WEIGHTS = (0.0, 0.5, 0.7, 0.85, 0.95, 1.0)  # bounds of the reliability table
# Values of the gate's constants that are tried, the one that it has among them.
TRIED = {
    "FACTORS": (1, 3, 16),
    "SHRINK": (0.1, 0.3, 0.6),
    "RIDGE": (0.1, 1.0, 10.0),
    "RESIDUAL": (0.0, 0.25, 0.5, 0.75),
    "DOUBT": (0.0, 0.5, 1.0),
}
TITLES = {
    "FACTORS": "factors that are taken out at a module",
    "SHRINK": "shrinkage of the adapters' correlations",
    "RIDGE": "ridge of the second score",
    "RESIDUAL": "share of the second score",
    "DOUBT": "share of the confidence",
}
Constants = Mapping[str, float]
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measured:
    """The responses of a library to generic text and to labelled queries.

    Attributes:
        name: of the library.
        candidates: adapters, and the base model last.
        reference, responses: of generic prompts and of queries, (prompts, adapters, modules, 2).
        reference_confidence, confidence: of the base model on them, (prompts,).
        labels: the adapter of each query, `base` where none fits.
        splits: of each query, one of FITS and NOBODY.
    """

    name: str
    candidates: list[str]
    reference: NDArray[np.float32]
    reference_confidence: NDArray[np.float32]
    responses: NDArray[np.float32]
    confidence: NDArray[np.float32]
    labels: NDArray[np.str_]
    splits: NDArray[np.str_]

    def right(self, top: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which choices are the right ones."""
        pairs = zip(top.tolist(), self.labels.tolist(), strict=True)
        return np.array([routed(self.candidates[k], label) for k, label in pairs])

    def fitted(self, **settings: Any) -> PrototypeGate:
        """A gate with some settings."""
        return PrototypeGate(**settings).fit(self.reference, confidence=self.reference_confidence)


def measured(of: Labelled) -> Measured:
    """Measures a library in one pass of its base model, or reads what was kept of that."""
    labels, splits = (of.rows[name].to_numpy(str) for name in ("adapter", "split"))
    file = KEPT / f"{of.name}.npz"
    if not file.exists():
        base, adapters = (
            load_base(of.base, "cpu", DTYPES.get(of.name, "float32")),
            load_library([str(of.adapters)]),
        )
        protos, calibration = prototypes(adapters, dtype=base.model.dtype), Calibration(base)
        means, pad = calibration.means(list(protos)), base.tokenizer.pad_token_id
        measured = calibration.measured(adapters, protos, means)
        rows = truncated(encode(base.tokenizer, of.rows["input"].tolist()))
        probed = probe(base.model, rows, pad, protos, means, len(adapters), of.name)
        KEPT.mkdir(parents=True, exist_ok=True)
        np.savez(
            file,
            candidates=[*(adapter.name for adapter in adapters), BASE_COLUMN],
            reference=measured.responses,
            reference_confidence=measured.confidence,
            responses=probed.responses,
            confidence=probed.confidence,
        )
    with np.load(file) as kept:
        arrays = {name: kept[name] for name in kept.files}
    return Measured(of.name, arrays.pop("candidates").tolist(), **arrays, labels=labels, splits=splits)


def constants() -> dict[str, float]:
    """The gate's own."""
    return {name: getattr(gate, name) for name in TRIED}


@cache
def _judged(of: Measured, chosen: tuple[tuple[str, float], ...]) -> tuple[gate.Judged, Array]:
    """What a gate with these constants makes of the queries, and the base model's standardised confidence."""
    with patch.dict(vars(gate), dict(chosen)):
        judged = PrototypeGate().fit(of.reference).judge(of.responses)
    sure = (of.confidence - of.reference_confidence.mean()) / of.reference_confidence.std(ddof=1)
    return judged, np.asarray(sure, np.float64)


def figures(of: Measured, chosen: Constants) -> dict[str, float]:
    """Shares of each split that are sent to the right adapter, where HARM of the foreign ones are.

    Under `own right`: of queries in own phrasing whose best adapter is the right one, sent or not.
    """
    learned = tuple((name, chosen[name]) for name in ("FACTORS", "SHRINK", "RIDGE"))
    judged, sure = _judged(of, learned)
    best = judged.scores.max(1)
    lead = (1 - chosen["RESIDUAL"]) * best + chosen["RESIDUAL"] * judged.residual - chosen["DOUBT"] * sure
    foreign = np.sort(lead[np.isin(of.splits, NOBODY)])[::-1]
    right = of.right(judged.scores.argmax(1))
    sent = right & (lead > foreign[int(HARM * len(foreign))])
    found = {split: float(sent[of.splits == split].mean()) for split in FITS if (of.splits == split).any()}
    return found | {"own right": float(right[of.splits == "own"].mean())}


def every() -> list[dict[str, float]]:
    """All choices of constants that are tried."""
    return [dict(zip(TRIED, values, strict=True)) for values in product(*TRIED.values())]


def chosen_by(others: Sequence[Measured]) -> dict[str, float]:
    """The constants that send most other phrasings rightly, on average over these libraries.

    Among those that cost none of them more than a point of own phrasing against the gate as it is.
    """
    now = [figures(of, constants())["own"] for of in others]

    def gain(chosen: Constants) -> float:
        found = [figures(of, chosen) for of in others]
        if any(one["own"] < own - 0.01 for one, own in zip(found, now, strict=True)):
            return -1.0
        return float(np.mean([one["unseen"] for one in found]))

    return max(every(), key=gain)


def left_out(found: Sequence[Measured]) -> list[str]:
    """Each library under the constants that the others choose, and under the gate's own."""
    lines = header(
        ["library", "chosen by the others", "own", "unseen", "mc", "own, as it is", "unseen", "mc"], 2
    )
    rows = []
    for of in found:
        chosen = chosen_by([other for other in found if other is not of])
        rows.append([figures(of, one) for one in (chosen, constants())])
        words = ", ".join(f"{value:g}" for value in chosen.values())
        lines.append(row(of.name, words, *(_cell(one.get(split)) for one in rows[-1] for split in FITS)))
    for title, how in (("mean", np.mean), ("worst", np.min)):
        cells = [
            _cell(float(how([one[k][split] for one in rows if split in one[k]])))
            for k in (0, 1)
            for split in FITS
        ]
        lines.append(row(f"**{title}**", "", *cells))
    return lines


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def terms(found: Sequence[Measured]) -> list[str]:
    """Other phrasings that are sent rightly, with one constant changed at a time."""
    own, now = constants(), " **(as it is)**"
    lines = header(["constant", *(of.name for of in found), "mean", "worst", "own, worst"])
    for name, values in TRIED.items():
        for value in values:
            shares = [figures(of, own | {name: value}) for of in found]
            unseen = [one["unseen"] for one in shares]
            cells = (*unseen, np.mean(unseen), min(unseen), min(one["own"] for one in shares))
            title = f"{TITLES[name]}: {value:g}{now if value == own[name] else ''}"
            lines.append(row(title, *(f"{cell:.3f}" for cell in cells)))
    return lines


def operating(found: Sequence[Measured]) -> list[str]:
    """What is sent rightly in each split, and what stays with the base model, by false positive rate."""
    lines = header(["false_positive_rate", *(of.name for of in found)], 1 + len(found))
    now = PrototypeGate().false_positive_rate
    for share in SHARES:
        cells = []
        for of in found:
            top = _top(of, share)
            right, base = of.right(top), len(of.candidates) - 1
            rates = [
                f"{right[of.splits == split].mean():.3f}" for split in FITS if (of.splits == split).any()
            ]
            stay = [
                f"{(top == base)[of.splits == split].mean():.3f}"
                for split in NOBODY
                if (of.splits == split).any()
            ]
            cells.append(f"{' '.join(rates)}; {' '.join(stay)}")
        lines.append(row(f"{share:g}{' **(as it is)**' if share == now else ''}", *cells))
    return lines


@cache
def _top(of: Measured, false_positive_rate: float) -> NDArray[np.int64]:
    return of.fitted(false_positive_rate=false_positive_rate).predict(of.responses, of.confidence)


def reliability(found: Sequence[Measured], **settings: Any) -> list[str]:
    """How often the top candidate is right, by its weight; each split of a library counts the same."""
    spans = [f"{low:g} to {high:g}" for low, high in pairwise(WEIGHTS)]
    lines = header(["library", *spans, "mean gap"])
    for of in found:
        weights = of.fitted(**settings).predict_proba(of.responses, of.confidence)
        top, right = weights.max(1), of.right(weights.argmax(1))
        _, split, sizes = np.unique(of.splits, return_inverse=True, return_counts=True)
        counts = 1 / sizes[split] / len(sizes)  # (queries,) sum to 1
        place = np.digitize(top, WEIGHTS[1:-1])
        cells, gap = [], 0.0
        for n in range(len(spans)):
            mine = place == n
            if not mine.any():
                cells.append("")
                continue
            said, came = (float((counts * x)[mine].sum() / counts[mine].sum()) for x in (top, right))
            gap += float(counts[mine].sum()) * abs(said - came)
            cells.append(f"{said:.2f}: {came:.2f}")
        lines.append(row(of.name, *cells, f"{gap:.3f}"))
    return lines


def temperatures(found: Sequence[Measured]) -> list[str]:
    """The mean gap between the weight of the top candidate and how often it is right, by temperature."""
    lines = header(["temperature", *(of.name for of in found), "mean", "worst"])
    for temperature in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0):
        gaps = [float(line.rsplit("|", 2)[1]) for line in reliability(found, temperature=temperature)[2:]]
        now = " **(as it is)**" if temperature == PrototypeGate().temperature else ""
        lines.append(
            row(f"{temperature:g}{now}", *(f"{gap:.3f}" for gap in (*gaps, np.mean(gaps), max(gaps))))
        )
    return lines


def details(found: Sequence[Measured]) -> list[str]:
    """What the findings of docs/lab.md are taken from; it is printed and stands in no page."""
    sections = {
        "One constant at a time": (terms, "Other phrasings sent rightly, at the same level of harm."),
        "Operating points": (
            operating,
            f"Sent rightly of {', '.join(FITS)}; left to the base model of {', '.join(NOBODY)}.",
        ),
        "How sure": (
            reliability,
            "The mean weight of the top candidates in a range, and how often these are right.",
        ),
        "The temperature": (
            temperatures,
            "The mean gap between the weight of the top candidate and how often it is right.",
        ),
    }
    lines = []
    for title, (section, note) in sections.items():
        lines += ["", f"## {title}", "", note, "", *section(found)]
    return lines


def main() -> None:
    """Measures and writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    found = [measured(of) for of in libraries() if of.name not in CHATS]
    print("\n".join(details(found)))
    insert(OUT, "left_out", left_out(found))


if __name__ == "__main__":
    main()
