"""Draws queries and prototypes before and after calibration into docs/geometry.svg.

`python -m scripts.docs.geometry`. Reads labels for the colours alone.
"""

from __future__ import annotations

import argparse
from html import escape
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from router.constants import LIBRARY
from router.library.adapters import load_library
from router.model.answer import encode
from router.model.base import EMBEDDED, load_base
from router.routing.calibration import Calibration
from router.routing.gate import PrototypeGate
from router.routing.probe import probe
from router.routing.prototypes import prototypes
from scripts.bench.score import labelled, routed

OUT = Path("docs/geometry.svg")
SIZE, MARGIN, HEAD = 460, 40, 34  # of a panel, pixels

Array = NDArray[np.float64]


def measured() -> tuple[list[str], list[str], Array, Array]:
    """Adapters' names, queries' own adapters, and (queries, adapters) before and after calibration."""
    base, adapters, rows = load_base(EMBEDDED), load_library([str(LIBRARY)]), labelled("eval")
    protos, calibration = prototypes(adapters, dtype=base.model.dtype), Calibration(base)
    means = calibration.means(list(protos))
    reference = calibration.responses(adapters, protos, means)
    ids = encode(base.tokenizer, list(rows["input"]))
    found = probe(base.model, ids, base.tokenizer.pad_token_id, protos, means, len(adapters)).responses
    scores = PrototypeGate().fit(reference).decision_function(found)
    return [adapter.name for adapter in adapters], list(rows["adapter"]), np.nanmean(found[..., 0], 2), scores


def layout(points: Array) -> tuple[Array, Array]:
    """Places in the unit square of the queries and of the adapters, by t-SNE on cosines.

    An adapter's prototype is the unit vector of its own axis.
    """
    both = np.vstack([points, np.eye(points.shape[1]) * points.max()])
    flat = TSNE(metric="cosine", init="random", perplexity=25, random_state=0).fit_transform(both)
    low, high = flat.min(0), flat.max(0)
    placed = (flat - low) / (high - low)
    return placed[: len(points)], placed[len(points) :]


def panel(title: str, left: int, names: list[str], own: list[str], points: Array) -> list[str]:
    """The SVG elements of one panel."""
    queries, adapters = layout(points)

    def at(place: Array) -> tuple[str, str]:
        x, y = MARGIN + place * (SIZE - 2 * MARGIN)
        return f"{left + x:.1f}", f"{HEAD + y:.1f}"

    def colour(name: str) -> str:
        n = names.index(name)
        return f"hsl({n * 360 // len(names)} 65% {40 + 14 * (n % 2)}%)"

    strongest = [names[n] for n in points.argmax(1)]
    right = sum(map(routed, strongest, own)) / len(own)
    title = f"{title}: {right:.0%} strongest at their own adapter"
    lines = [f'<text x="{left + SIZE / 2}" y="22" class="title">{escape(title)}</text>']
    for place, name, found in zip(queries, own, strongest, strict=True):
        if name != found:
            (x, y), (to_x, to_y) = at(place), at(adapters[names.index(found)])
            lines.append(f'<path d="M{x} {y}L{to_x} {to_y}" class="astray"/>')
    for place, name in zip(queries, own, strict=True):
        x, y = at(place)
        lines.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour(name)}"><title>{name}</title></circle>')
    for place, name in zip(adapters, names, strict=True):
        x, y = at(place)
        lines.append(f'<path d="M{x} {y}m-5 0h10m-5 -5v10" class="cross"/>')
        lines.append(f'<text x="{x}" y="{float(y) - 7:.1f}" class="name" fill="{colour(name)}">{name}</text>')
    return lines


def main() -> None:
    """Measures, lays out and writes the figure."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    names, own, before, after = measured()
    style = (
        "svg{background:#fff}text{font-family:sans-serif;text-anchor:middle}.title{font-size:14px;fill:#222}"
        ".name{font-size:10px;paint-order:stroke;stroke:#fff;stroke-width:3px}.cross{stroke:#222;stroke-width:1.5}"
        ".astray{stroke:#999;stroke-width:.5}"
    )
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * SIZE} {SIZE + HEAD}" role="img">',
        "<title>Queries and prototypes before and after calibration</title>",
        f"<style>{style}</style>",
        *panel("raw responses", 0, names, own, before),
        *panel("calibrated scores", SIZE, names, own, after),
        "</svg>",
    ]
    OUT.write_text("\n".join(lines) + "\n", "utf-8")


if __name__ == "__main__":
    main()
