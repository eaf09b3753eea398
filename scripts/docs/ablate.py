"""What each choice of the gate is worth, on every library that is at hand: `python -m scripts.docs.ablate`.

Writes docs/ablations.md. No constant is chosen by one library, so each row has the figures of all of them
side by side. Every library is measured once; the rows are settings of the package's own gate. Reads labels,
so nothing that routes may import it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.constants import BASE_COLUMN, LIBRARY
from router.files import replacing
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import EMBEDDED, load_base
from router.model.passes import truncated
from router.routing.calibration import Calibration
from router.routing.gate import PrototypeGate
from router.routing.probe import END, probe
from router.routing.prototypes import prototypes
from scripts.bench.markdown import header, row
from scripts.bench.score import labelled, read_texts, routed

OUT = Path("docs/ablations.md")
DEVSET = Path("../shared/devset")  # a second library with labelled queries, where it is at hand
SPLITS = {"own": "own", "unseen": "other", "mc": "choice", "none": "base"}  # and their columns
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
        labels: the adapter of each query, `base` where none fits.
        splits: of each query, one of SPLITS.
    """

    name: str
    candidates: list[str]
    modules: list[str]
    reference: Any
    reference_confidence: Any
    responses: Any
    confidence: Any
    labels: list[str]
    splits: NDArray[np.str_]

    def shares(self, top: NDArray[np.int64]) -> list[str]:
        """The share of right choices in each split; empty where the library has no such queries."""
        pairs = zip(top.tolist(), self.labels, strict=True)
        right = np.array([routed(self.candidates[k], label) for k, label in pairs])
        found = (right[self.splits == split] for split in SPLITS)
        return [f"{part.mean():.3f}" if len(part) else "" for part in found]


def measured(name: str, folder: Path, texts: list[str], labels: list[str], splits: list[str]) -> Measured:
    """Measures a library of the embedded base model in one pass."""
    base, adapters = load_base(EMBEDDED, "cpu", "float32"), load_library([str(folder)])
    protos, calibration = prototypes(adapters, dtype=base.model.dtype), Calibration(base)
    means = calibration.means(list(protos))
    rows, pad = truncated(encode(base.tokenizer, texts)), base.tokenizer.pad_token_id
    return Measured(
        name,
        [*(adapter.name for adapter in adapters), BASE_COLUMN],
        list(protos),
        calibration.responses(adapters, protos, means),
        calibration.confidence(),
        *probe(base.model, rows, pad, protos, means, len(adapters), name),
        labels,
        np.array(splits),
    )


def libraries() -> Iterator[Measured]:
    """The committed library, and the second one where it is at hand."""
    own, unseen = labelled("eval"), labelled("eval_unseen")
    labels = [*own["adapter"], *unseen["adapter"]]
    splits = ["own"] * len(own) + [
        "none" if label == BASE_COLUMN else "unseen" for label in unseen["adapter"]
    ]
    yield measured("data/library", LIBRARY, [*own["input"], *unseen["input"]], labels, splits)
    if DEVSET.is_dir():
        rows = read_texts(DEVSET / "queries.csv").merge(read_texts(DEVSET / "labels.csv"), on="id")
        labels = rows["task"].where(rows["split"] != "none", BASE_COLUMN).tolist()
        yield measured("second", DEVSET / "library", rows["input"].tolist(), labels, rows["split"].tolist())


def scores(of: Measured, keep: Any = slice(None), prompts: Any = slice(None), **settings: Any) -> Array:
    """The scores of a gate with other settings, on some modules, fitted to some generic prompts."""
    gate = PrototypeGate(**settings).fit(of.reference[prompts][:, :, keep])
    return gate.decision_function(of.responses[:, :, keep])


def early(of: Measured, share: float) -> NDArray[np.bool_]:
    """Which modules are in the first layers."""
    depth = np.array([int(module.split(".")[2]) for module in of.modules])
    return np.asarray(depth < share * (depth.max() + 1))


def page(found: list[Measured]) -> list[str]:
    """The lines of docs/ablations.md."""
    columns = [f"{of.name}: {column}" for of in found for column in SPLITS.values()]
    text = f"""# What each choice of the gate is worth

Shares of queries whose top candidate is the right one: on queries as phrased in training (*own*), in other
phrasings (*other*), as multiple choice (*choice*), and on queries that no adapter fits, where the right one
is the base model (*base*). `data/library` has {len(found[0].candidates) - 1} adapters and the queries of
`data/eval` and `data/eval_unseen`. The second library was trained apart from it, on other tasks and data; it
is not part of this repository. {len(found[0].reference)} generic prompts, float32. Made by
`python -m scripts.docs.ablate`.
"""
    lines = text.splitlines()

    def table(title: str, rows: dict[str, list[NDArray[np.int64]]]) -> None:
        lines.extend(["", f"## {title}", "", *header(["gate", *columns])])
        for name, tops in rows.items():
            cells = [cell for of, top in zip(found, tops, strict=True) for cell in of.shares(top)]
            lines.append(row(name, *cells))

    each = found
    table(
        "Which adapter: the highest score, whatever the level",
        {
            "**as it is**": [scores(of).argmax(1) for of in each],
            **{
                f"the end of the prompt counts {weight:g} times its whole (0.5)": [
                    scores(of, end_weight=weight).argmax(1) for of in each
                ]
                for weight in (0.0, 0.25, 1.0, 2.0)
            },
            "no calibration: largest mean cosine": [
                np.nanmean(of.responses[..., 0], 2).argmax(1) for of in each
            ],
            "only the first third of the layers": [scores(of, early(of, 1 / 3)).argmax(1) for of in each],
            "only the first two thirds of the layers": [
                scores(of, early(of, 2 / 3)).argmax(1) for of in each
            ],
            **{
                f"every {step}nd generic prompt" if step == 2 else f"every {step}th generic prompt": [
                    scores(of, prompts=slice(None, None, step)).argmax(1) for of in each
                ]
                for step in (2, 4)
            },
        },
    )

    def fitted(of: Measured, share: float) -> PrototypeGate:
        return PrototypeGate(false_alarm=share).fit(of.reference, confidence=of.reference_confidence)

    gates = {share: [fitted(of, share) for of in each] for share in SHARES}
    plain = [PrototypeGate().fit(of.reference) for of in each]
    table(
        "Does any adapter fit: the level",
        {
            f"false_alarm {share:g}" + (" **(as it is)**" if share == PrototypeGate().false_alarm else ""): [
                gate.predict(of.responses, of.confidence) for gate, of in zip(gates[share], each, strict=True)
            ]
            for share in SHARES
        }
        | {
            "as it is, without the base model's confidence": [
                gate.predict(of.responses) for gate, of in zip(plain, each, strict=True)
            ]
        },
    )
    lines.extend(["", f"The end of a prompt is its last {END} tokens.", ""])
    return lines


SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)


def main() -> None:
    """Measures and writes the page."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    with replacing(OUT) as file:
        file.write("\n".join(page(list(libraries()))))


if __name__ == "__main__":
    main()
