"""Draws queries and prototypes before and after calibration into docs/geometry.svg.

`python -m scripts.docs.geometry`, with the extra `notebook`. Reads labels for the colours alone.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.manifold import TSNE

from router.routing.gate import PrototypeGate
from scripts.bench.development import COMMITTED, libraries
from scripts.bench.responses import measured
from scripts.bench.score import routed

OUT = Path("docs/geometry.svg")
Array = NDArray[np.float64]


def points() -> tuple[list[str], list[str], Array, Array]:
    """Adapters' names, queries' labelled adapters, and (queries, adapters) before and after calibration."""
    (of,) = (one for one in libraries() if one.name == COMMITTED)
    found = measured(of)
    own = found.splits == "own"
    responses, labels = found.responses[own], found.labels[own].tolist()
    scores = PrototypeGate().fit(found.reference).decision_function(responses)
    return found.candidates[:-1], labels, np.nanmean(responses[..., 0], 2), scores


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
    names, labels, before, after = points()
    figure, panels = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    draw(panels[0], "raw responses", names, labels, before)
    draw(panels[1], "calibrated scores", names, labels, after)
    figure.savefig(OUT, metadata={"Date": None})


if __name__ == "__main__":
    main()
