"""What the gate's constants are worth: `python -m scripts.docs.ablate` writes docs/ablations.md.

No constant is chosen by the libraries that it is shown on. For each library, all constants are chosen by the
figures of the others, and its own figures are shown under that choice. Reads labels, so nothing that routes
may import it.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from router.routing import gate
from router.routing.gate import PrototypeGate
from scripts.bench.development import CHATS, FITS, FOREIGN, MIXED, libraries
from scripts.bench.markdown import header, insert, row
from scripts.bench.responses import Measured, measured

OUT = Path("docs/ablations.md")
SPLITS, NOBODY = FITS[:3], FOREIGN[:3]  # an adapter is right, or the base model; of prompts
HARM = 0.05  # share of foreign queries that are sent to an adapter
# Values of the gate's constants that are tried, the one that it has among them.
TRIED = {
    "FACTORS": (1, 3, 16),
    "SHRINK": (0.1, 0.3, 0.6),
    "RIDGE": (0.1, 1.0, 10.0),
    "RESIDUAL": (0.0, 0.25, 0.5, 0.75),
    "DOUBT": (0.0, 0.5, 1.0),
}
Constants = Mapping[str, float]
NOW: Constants = {name: getattr(gate, name) for name in TRIED}  # the gate's own
EVERY = [dict(zip(TRIED, values, strict=True)) for values in product(*TRIED.values())]


@cache
def _judged(of: Measured, *learned: tuple[str, float]) -> tuple[gate.Judged, NDArray[np.float64]]:
    """What a gate with these constants makes of the queries, and the base model's standardised confidence."""
    with patch.dict(vars(gate), learned):
        every, absent = np.full(len(of.reference), True), np.isnan(of.reference[0])
        made = PrototypeGate()
        made.handicap_ = np.zeros(of.reference.shape[1])
        learned_gate = made._learn(made._by_module(of.reference), every, absent)
        judged = learned_gate.judge(of.responses)
    sure = (of.confidence - of.reference_confidence.mean()) / of.reference_confidence.std(ddof=1)
    return judged, np.asarray(sure, np.float64)


def figures(of: Measured, chosen: Constants) -> dict[str, float]:
    """Shares of each split that are sent to the right adapter, where HARM of the foreign ones go to one."""
    judged, sure = _judged(of, *((name, chosen[name]) for name in ("FACTORS", "SHRINK", "RIDGE")))
    best = judged.scores.max(1)
    lead = (1 - chosen["RESIDUAL"]) * best + chosen["RESIDUAL"] * judged.residual - chosen["DOUBT"] * sure
    foreign = np.sort(lead[np.isin(of.splits, NOBODY)])[::-1]
    sent = of.right(judged.scores.argmax(1)) & (lead > foreign[int(HARM * len(foreign))])
    return {split: float(sent[of.splits == split].mean()) for split in SPLITS if (of.splits == split).any()}


def chosen_by(others: Sequence[Measured]) -> Constants:
    """The constants that send most other phrasings rightly, on average over these libraries.

    Among those that cost none of them more than a point of own phrasing against the gate as it is.
    """
    now = [figures(of, NOW)["own"] for of in others]

    def gain(chosen: Constants) -> float:
        found = [figures(of, chosen) for of in others]
        if any(one["own"] < own - 0.01 for one, own in zip(found, now, strict=True)):
            return -1.0
        return float(np.mean([one["unseen"] for one in found]))

    return max(EVERY, key=gain)


def left_out(found: Sequence[Measured]) -> list[str]:
    """Each library under the constants that the others choose, and under the gate's own."""
    names = ["library", "chosen by the others", "own", "unseen", "mc", "own, as it is", "unseen", "mc"]
    lines, cells = header(names, 2), []
    for of in found:
        chosen = chosen_by([other for other in found if other is not of])
        cells.append([figures(of, one).get(split, np.nan) for one in (chosen, NOW) for split in SPLITS])
        lines.append(_line(of.name, ", ".join(f"{value:g}" for value in chosen.values()), cells[-1]))
    table = np.array(cells)
    lines.append(_line("**mean**", "", np.nanmean(table, 0)))
    lines.append(_line("**worst**", "", np.nanmin(table, 0)))
    return lines


def _line(name: str, chosen: str, shares: Sequence[float] | NDArray[np.float64]) -> str:
    return row(name, chosen, *("" if np.isnan(share) else f"{share:.3f}" for share in shares))


def false_positives(found: Sequence[Measured]) -> list[str]:
    """The share of foreign queries that an adapter gets, where the others choose how near generic text is."""
    lines = header(["library", "odds chosen by the others", "false positive rate", "as it is"])
    rate = PrototypeGate().false_positive_rate
    for of in found:
        nearer = np.exp(np.mean([np.log(_nearer(other)) for other in found if other is not of]))
        with patch.object(gate, "NEARER", nearer):
            chosen = gate.generic_share(rate)
        sent = (_sent(of, share) for share in (chosen, gate.generic_share(rate)))
        lines.append(row(of.name, f"{nearer:.2f}", *(f"{share:.3f}" for share in sent)))
    return lines


def _nearer(of: Measured) -> float:
    """The odds that generic text is sent to an adapter, against those of foreign queries."""
    share = gate.generic_share(PrototypeGate().false_positive_rate)
    sent = _sent(of, share)
    return share / (1 - share) * (1 - sent) / sent


@cache
def _sent(of: Measured, share: float) -> float:
    """The share of foreign queries that is sent to an adapter where this share of generic text is."""
    fitted = PrototypeGate().fit(of.reference, confidence=of.reference_confidence)
    fitted.threshold_ = gate.threshold(fitted.reference_leads_, share)
    top = fitted.predict(of.responses[np.isin(of.splits, NOBODY)], of.confidence[np.isin(of.splits, NOBODY)])
    return float((top < fitted.n_adapters_).mean())


def main() -> None:
    """Measures and writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    found = [measured(of) for of in libraries() if of.name not in (*CHATS, MIXED)]
    insert(OUT, "false_positives", false_positives(found))
    insert(OUT, "left_out", left_out(found))


if __name__ == "__main__":
    main()
