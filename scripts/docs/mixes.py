"""When a mix answers better than the best adapter alone: `python -m scripts.docs.mixes`.

Takes the labelled queries for which the gate is unsure between adapters, answers each with its own mix by
several rules, and writes the table in docs/method.md. Reads labels, so nothing that routes may import it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import Base, load_base
from router.submission import GENERATION, Query
from scripts.bench.development import SPLITS, Labelled, libraries
from scripts.bench.markdown import header, insert, row
from scripts.bench.quality.cells import COLUMNS, answer_part, method_named
from scripts.bench.quality.settings import Part

METHOD = Path("docs/method.md")
UNSURE = 0.9  # of the adapters' weight the best one has less
SAMPLE = 110  # queries of a library, at most
FITS = SPLITS[:2]  # splits in which an adapter is right and the answer is written
# An adapter that has more than this share of the adapters' weight answers alone.
RULES = {
    "the best adapter alone": 0.0,
    "alone from 0.5 on **(as it is)**": 0.5,
    "alone from 0.75 on": 0.75,
    "mix": 1.0,
}


def unsure(of: Labelled, base: Base, adapters: Sequence[Any]) -> Part:
    """Queries that go to adapters, none of which has much of the weight; evenly drawn."""
    rows = of.rows[of.rows["split"].isin(FITS)].reset_index(drop=True)
    method = method_named("proto_route")("proto_route", base, adapters)
    texts = rows["input"].tolist()
    queries = [Query(str(n), text, GENERATION) for n, text in enumerate(texts)]
    chosen = between(method.route(queries, encode(base.tokenizer, texts)).weights)
    return Part("unsure", rows.iloc[chosen].reset_index(drop=True))


def between(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Which queries those are, at most SAMPLE; weights: (queries, candidates), the base model last."""
    best, base = weights[:, :-1].max(1), weights[:, -1]
    found = np.flatnonzero((best > base) & (best < UNSURE * (1 - base)))
    some = np.linspace(0, len(found) - 1, min(SAMPLE, len(found))).round().astype(int)
    return np.asarray(found[some])


def cells(part: Part, name: str, base: Base, adapters: Sequence[Any]) -> str:
    """The mean score and the mean log-probability of the reference, in nats a token."""
    answers = answer_part(part, method_named(name)(name), base, list(adapters), "0")["answers"]
    means = [float(np.mean([one[COLUMNS.index(key)] for one in answers])) for key in ("score", "nats")]
    return f"{means[0]:.3f}, {means[1]:.2f}"


def line(of: Labelled) -> str:
    """A library's row."""
    base, adapters = load_base(of.base), load_library([str(of.adapters)])
    part = unsure(of, base, adapters)
    found = []
    for share in RULES.values():
        with patch("router.routing.clusters.PURE", share):
            found.append(cells(part, "per_query", base, adapters))
    return row(of.name, len(part.rows), *found, cells(part, "oracle", base, adapters))


def main() -> None:
    """Measures and writes."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    names = ["library", "queries", *RULES, "oracle"]
    insert(METHOD, "mixes", [*header(names), *map(line, libraries())])


if __name__ == "__main__":
    main()
