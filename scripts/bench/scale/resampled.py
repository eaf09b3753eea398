"""Responses of libraries that nobody has, resampled from those of the committed one.

Passes with thousands of adapters take seconds a query, so statistics stand in for them. The committed
adapters' standardised log responses to generic text and to data/test.csv are real. A further adapter has a
real one as its parent: the same means and deviations, and for each text a share of the parent's own
response, from 0.3 to 0.95, beside the parent's response to another text. So there are families, of close and
of distant relatives. A further query is mostly a real one, and a little another one.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from router.constants import LIBRARY
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import EMBEDDED, load_base
from router.model.passes import truncated
from router.routing.calibration import Calibration
from router.routing.probe import probe
from router.routing.prototypes import prototypes
from router.submission import read_queries
from scripts.bench.libraries import FOLDER

FILE = FOLDER / "responses.safetensors"
SEED = 5
BLOCK = 256  # adapters at a time
OWN = 0.95  # of a further query: the share of the real one
LOW, HIGH = 0.3, 0.95  # of a further adapter: the share of its parent

Responses = NDArray[np.float32]


def real() -> tuple[Responses, Responses]:
    """Log responses of the committed library to generic text and to queries, (texts, 22, modules, 2)."""
    if not FILE.exists():
        base, adapters = load_base(EMBEDDED), load_library([str(LIBRARY)])
        texts = dict.fromkeys(query.input for query in read_queries(Path("data/test.csv")))
        rows, pad = truncated(encode(base.tokenizer, list(texts))), base.tokenizer.pad_token_id
        protos, calibration = prototypes(adapters, dtype=base.model.dtype), Calibration(base)
        means = calibration.means(list(protos))
        reference = calibration.responses(adapters, protos, means)
        found = probe(base.model, rows, pad, protos, means, len(adapters)).responses
        FILE.parent.mkdir(parents=True, exist_ok=True)
        save_file({"reference": reference, "queries": found}, FILE)
    arrays = load_file(FILE)
    reference, found = (np.log(arrays[name].clip(1e-6)) for name in ("reference", "queries"))
    return reference, found


class Library:
    """So many adapters, of which the first are real.

    Args:
        size: number of adapters.
    """

    def __init__(self, size: int) -> None:
        reference, queries = real()
        self.mean, self.std = reference.mean(0), reference.std(0, ddof=1)
        self.z = [((of - self.mean) / self.std).astype(np.float32) for of in (reference, queries)]
        rng = np.random.default_rng(SEED)
        self.size, self.parents = size, np.arange(size) % len(self.mean)
        self.shares = np.where(np.arange(size) < len(self.mean), 1, rng.uniform(LOW, HIGH, size))
        self.steps = rng.integers(1, 10_000, size)  # which other text an adapter hears beside each

    def reference(self) -> Responses:
        """Responses to generic text, (160, adapters, modules, 2)."""
        z = self.z[0]
        return self._heard(z, z, np.arange(len(z)))

    def queries(self, count: int, seed: int) -> Responses:
        """Responses to so many queries, (queries, adapters, modules, 2)."""
        rng, real = np.random.default_rng([SEED, seed]), self.z[1]
        one, other = rng.integers(len(real), size=(2, count))
        return self._heard(OWN * real[one] + np.float32(np.sqrt(1 - OWN**2)) * real[other], real, one)

    def _heard(self, z: Responses, texts: Responses, numbers: NDArray[np.int64]) -> Responses:
        """Responses to texts that are mostly the real ones of these numbers."""
        out = np.empty((len(z), self.size, *z.shape[2:]), np.float32)
        for start in range(0, self.size, BLOCK):
            part = slice(start, start + BLOCK)
            parents, shares = self.parents[part], self.shares[part, None, None].astype(np.float32)
            others = (numbers[:, None] + 1 + self.steps[part] % (len(texts) - 1)) % len(texts)
            own = shares * z[:, parents] + np.sqrt(1 - shares**2) * texts[others, parents]
            np.exp(self.mean[parents] + self.std[parents] * own, out=out[:, part])
        return out
