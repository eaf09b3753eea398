"""How often the gate is right, by the margin of its choice: `python -m scripts.docs.margins`.

Routes the labelled queries, answers none, and writes the table of docs/method.md.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np

from router.constants import BASE_COLUMN, LIBRARY
from router.library.adapters import load_library
from router.methods.proto_route import ProtoRoute
from router.model.base import EMBEDDED, load_base
from router.routing.evidence import LOW_MARGIN
from router.submission import GENERATION, Query
from scripts.bench.markdown import header, insert, row
from scripts.bench.score import labelled, routed

SETS = {"eval": "own phrasing", "eval_unseen": "other phrasings, and tasks without an adapter"}
BOUNDS = (0.0, 0.25, LOW_MARGIN, 1.0, 2.0, np.inf)
PAGE = Path("docs/method.md")


def main() -> None:
    """Measures and writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    base, adapters = load_base(EMBEDDED), load_library([str(LIBRARY)])
    candidates = [*(adapter.name for adapter in adapters), BASE_COLUMN]
    spans = [f"{low:g} to {high:g}" for low, high in pairwise(BOUNDS[:-1])]
    lines = header(["margin", *spans, f"more than {BOUNDS[-2]:g}"])
    for name, what in SETS.items():
        rows = labelled(name)
        method = ProtoRoute("proto_route")
        method.attach(base, adapters)
        queries = [Query(str(n), text, GENERATION) for n, text in enumerate(rows["input"])]
        weights, evidence = method.route(queries, method.encoded(queries))
        assert evidence is not None  # proto_route keeps it
        tops = [candidates[n] for n in weights.argmax(1)]
        right = np.array([routed(top, own) for top, own in zip(tops, rows["adapter"], strict=True)])
        place = np.digitize(evidence.margin, BOUNDS[1:-1])
        lines.append(row(what, *(_share(right[place == n]) for n in range(len(BOUNDS) - 1))))
    insert(PAGE, "margins", lines)


def _share(right: np.ndarray) -> str:
    return f"{right.mean():.2f} of {len(right)}" if len(right) else ""


if __name__ == "__main__":
    main()
