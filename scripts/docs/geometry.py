"""Draws queries and prototypes before and after calibration into docs/geometry.svg.

`python -m scripts.docs.geometry`, with the extra `notebook`. Reads labels for the colours alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
Array = NDArray[np.float64]


def measured() -> tuple[list[str], list[str], Array, Array]:
    """Adapters' names, queries' labelled adapters, and (queries, adapters) before and after calibration."""
    base, adapters, rows = load_base(EMBEDDED), load_library([str(LIBRARY)]), labelled("eval")
    protos, calibration = prototypes(adapters, dtype=base.model.dtype), Calibration(base)
    means = calibration.means(list(protos))
    reference = calibration.responses(adapters, protos, means)
    ids = encode(base.tokenizer, list(rows["input"]))
    found = probe(base.model, ids, base.tokenizer.pad_token_id, protos, means, len(adapters)).responses
    scores = PrototypeGate().fit(reference).decision_function(found)
    return [adapter.name for adapter in adapters], list(rows["adapter"]), np.nanmean(found[..., 0], 2), scores


def draw(panel: Any, title: str, names: list[str], labels: list[str], points: Array) -> None:
    """Places queries and adapters by t-SNE on cosines; an adapter is the unit vector of its own axis."""
    import matplotlib.pyplot as plt

    both = np.vstack([points, np.eye(len(names)) * points.max()])
    flat = TSNE(metric="cosine", init="random", perplexity=25, random_state=0).fit_transform(both)
    queries, adapters = flat[: len(points)], flat[len(points) :]
    strongest = points.argmax(1)
    right = np.array([routed(names[n], label) for n, label in zip(strongest, labels, strict=True)])
    for place, n in zip(queries[~right], strongest[~right], strict=True):
        panel.plot(*np.stack([place, adapters[n]]).T, color="0.6", linewidth=0.5, zorder=1)
    colours = plt.get_cmap("gist_rainbow")(np.linspace(0, 1, len(names)))
    panel.scatter(*queries.T, s=9, color=colours[[names.index(label) for label in labels]], zorder=2)
    panel.scatter(*adapters.T, marker="+", color="black", zorder=3)
    for place, name in zip(adapters, names, strict=True):
        panel.annotate(name, place, (0, 4), textcoords="offset points", ha="center", fontsize=8, zorder=4)
    panel.set_title(f"{title}: {right.mean():.0%} strongest at their own adapter", fontsize=10)
    panel.set_axis_off()


def main() -> None:
    """Measures, lays out and writes the figure."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "geometry", "svg.fonttype": "none"})
    names, labels, before, after = measured()
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    draw(panels[0], "raw responses", names, labels, before)
    draw(panels[1], "calibrated scores", names, labels, after)
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
