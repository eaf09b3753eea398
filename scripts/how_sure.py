"""How often the gate is right, by how far its best candidate is ahead: `python -m scripts.how_sure`.

Routes the labelled queries, answers none, and writes the table of docs/method.md.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np

from router.adapters import load_library
from router.base import EMBEDDED, load_base
from router.constants import BASE_COLUMN, LIBRARY
from router.evidence import CLOSE
from router.methods.proto_route import ProtoRoute
from router.submission import GENERATION, Query, read_rows
from scripts.benchmark.tables import insert

SETS = {"eval": "own phrasing", "eval_unseen": "other phrasings, and tasks without an adapter"}
BOUNDS = (0.0, 0.25, CLOSE, 1.0, 2.0, np.inf)
METHOD = Path("docs/method.md")


def main() -> None:
    """Measures and writes."""
    base, adapters = load_base(EMBEDDED), load_library([str(LIBRARY)])
    candidates = [*(adapter.name for adapter in adapters), BASE_COLUMN]
    spans = [f"{low:g} to {high:g}" for low, high in pairwise(BOUNDS[:-1])]
    lines = ["| best candidate ahead by | " + " | ".join([*spans, f"more than {BOUNDS[-2]:g}"]) + " |"]
    lines.append("| --- " + "| ---: " * (len(BOUNDS) - 1) + "|")
    for name, what in SETS.items():
        rows = [
            row
            for path in sorted(Path("data", name).glob("*.csv"))
            for _, row in read_rows(path, ("input", "adapter"))
        ]
        method = ProtoRoute("proto_route")
        method.attach(base, adapters)
        weights = method.route([Query(str(n), row["input"], GENERATION) for n, row in enumerate(rows)])
        assert method.evidence is not None
        chosen = [candidates[k] for k in weights.argmax(1)]
        right = np.array([own == row["adapter"] for own, row in zip(chosen, rows, strict=True)])
        place = np.digitize(method.evidence.lead, BOUNDS[1:-1])
        cells = [
            f"{right[place == k].mean():.2f} of {(place == k).sum()}" if (place == k).any() else ""
            for k in range(len(BOUNDS) - 1)
        ]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    insert(METHOD, "sure", lines)


if __name__ == "__main__":
    main()
