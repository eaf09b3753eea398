"""The responses of a library's adapters to its labelled queries, from one pass of its base model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from router.constants import BASE_COLUMN
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import load_base
from router.model.passes import truncated
from router.pipeline.calibration import Calibration
from router.routing.probe import probe
from router.routing.prototypes import prototypes
from scripts.bench.development import Labelled
from scripts.bench.score import routed

KEPT = Path("output/benchmark/responses")


@dataclass(frozen=True, eq=False)
class Measured:
    """The responses of a library to generic text and to labelled queries.

    Attributes:
        name: of the library.
        candidates: adapters, and the base model last.
        reference, responses: of generic prompts and of queries, (prompts, adapters, modules, 2).
        reference_confidence, confidence: of the base model on them, (prompts,).
        labels: the adapter of each query, `base` where none fits.
        splits: of each query.
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


def measured(of: Labelled) -> Measured:
    """Measures a library, or reads what was kept under output/benchmark/responses."""
    labels, splits = (of.rows[name].to_numpy(str) for name in ("adapter", "split"))
    file = KEPT / f"{of.name}.npz"
    if not file.exists():
        base = load_base(of.base, "cpu", "float32")
        adapters = load_library(list(map(str, of.adapters)))
        protos, calibration = prototypes(adapters, dtype=base.model.dtype), Calibration(base)
        means, pad = calibration.means(list(protos)), base.tokenizer.pad_token_id
        generic = calibration.measured(adapters, protos, means)
        rows = truncated(encode(base.tokenizer, of.rows["input"].tolist()))
        probed = probe(base.model, rows, pad, protos, means, len(adapters), of.name)
        KEPT.mkdir(parents=True, exist_ok=True)
        np.savez(
            file,
            candidates=[*(adapter.name for adapter in adapters), BASE_COLUMN],
            reference=generic.responses,
            reference_confidence=generic.confidence,
            responses=probed.responses,
            confidence=probed.confidence,
        )
    with np.load(file) as kept:
        arrays = {name: kept[name] for name in kept.files}
    return Measured(of.name, arrays.pop("candidates").tolist(), **arrays, labels=labels, splits=splits)
