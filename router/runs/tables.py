"""The tables of a finished run that notebooks/clusters.ipynb shows. Loads no model and draws nothing.

A run can be replayed from its evidence with another temperature, top_k or number of variants, since these
come after everything that needs the model.
"""

from collections.abc import Mapping
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from router.pipeline.record import RECORD
from router.routing.clusters import Array, cluster, losses
from router.routing.gate import PrototypeGate
from router.runs.compare import joined
from router.runs.load import Run, load
from router.runs.report.data import largest_first, mix, nearest_first, vote_means
from router.system.errors import InputError

KS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # numbers of variants on the curve
SHORT = 70  # characters of a query


class NotShown(InputError):
    """A notebook cannot show a run; it says so in one line, without a traceback."""

    def _render_traceback_(self) -> list[str]:  # what IPython asks for
        return [f"error: {self}"]


def open_run(folder: str | Path, evidence: bool = True) -> Run:
    """Reads a finished run, and its query files where they still are.

    A relative folder is looked for here and in the folders above, and so are the query files from where it
    is, so that a notebook opens what was written from the root of the repository.

    Raises:
        NotShown: there is no run, or it has no routing table, or evidence is needed and it has none.
    """
    here = [Path.cwd(), *Path.cwd().parents]
    root = next((place for place in here if (place / folder / RECORD).is_file()), Path.cwd())
    try:
        with chdir(root):
            run = load(root / folder)
    except InputError as error:
        raise NotShown(f"{error}; set RUN") from None
    if not run.names or (evidence and run.evidence is None):
        kind = "evidence" if run.names else "a routing table"
        method = run.record.method
        raise NotShown(f"{folder}: expected {kind}, but the method {method} keeps none; choose another run")
    return run


# What the run decided


def adapter_table(run: Run) -> pd.DataFrame:
    """For each candidate: queries where it is top, its share of all weight, and variants that it is in."""
    table = pd.DataFrame(index=run.names)
    table["top for"] = np.bincount(run.weights.argmax(1), minlength=len(run.names))
    table["share of all weight"] = run.weights.mean(0)
    table["in variants"] = (run.clusters.weights > 0).sum(0)
    return table.sort_values("top for", ascending=False, kind="stable")


def variant_table(run: Run) -> pd.DataFrame:
    """Each variant, largest first: its queries, mix and loss, two typical queries and the farthest.

    The loss is that of the queries' mixes; how typical a query is, of its own weights.
    """
    apart, lost = (losses(weights, run.clusters) for weights in (run.weights, run.mixes))
    rows = {}
    for n in largest_first(run):
        members = nearest_first(run.labels == n, apart)
        if not members:
            continue
        rows[n] = {
            "queries": len(members),
            "mix": mix(run.names, run.clusters.weights[n]),
            "mean loss": lost[run.labels == n].mean(),
            "typical": run.line(members[0], SHORT),
            "another": run.line(members[1], SHORT) if len(members) > 2 else "",
            "farthest": run.line(members[-1], SHORT) if len(members) > 1 else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant")


def mix_table(run: Run) -> pd.DataFrame:
    """Variants by candidates, sorted so that the top weights run down the diagonal."""
    mixes = run.clusters.weights
    order = np.lexsort((-mixes.max(1), mixes.argmax(1)))
    used = [name for name, column in zip(run.names, mixes.T, strict=True) if (column >= 0.005).any()]
    return pd.DataFrame(mixes, columns=run.names)[used].iloc[order]


def unsure_table(run: Run) -> pd.DataFrame:
    """All queries, lowest margin first."""
    table = pd.DataFrame({"query": [run.line(n, SHORT) for n in range(len(run.ids))]}, run.keys)
    assert run.evidence is not None
    table["margin"] = run.evidence.margin
    table["weights"] = [mix(run.names, row) for row in run.weights]
    table["variant"] = run.labels
    return table.sort_values("margin", kind="stable")


def vote_table(run: Run, adapter: str | None = None) -> pd.DataFrame:
    """Mean vote by layer and kind of module: of all queries, or of those where this adapter scores best.

    Raises:
        NotShown: no such adapter.
    """
    e = run.evidence
    assert e is not None
    if adapter is not None and adapter not in e.adapters:
        raise NotShown(f"expected one of the adapters {', '.join(e.adapters)}, got {adapter!r}")
    votes = e.votes if adapter is None else e.votes[e.best == e.adapters.index(adapter)]
    kinds, numbers, means = vote_means(votes, e.modules)
    index, columns = pd.Index(numbers, name="layer"), pd.Index(kinds, name="module")
    return pd.DataFrame(means[:-1, :-1].T, index, columns).sort_index(axis=1)


# What other settings would decide


def settings_of(run: Run) -> dict[str, Any]:
    """The settings of the run that `replay` can change."""
    return {name: getattr(run.settings, name) for name in ("temperature", "top_k", "n_variants")}


def replay(run: Run, temperature: float, top_k: int | None, n_variants: int | None) -> Run:
    """The run as it would have routed with these settings, decided again from its evidence."""
    assert run.evidence is not None
    scores = run.evidence.candidates.astype(np.float64)
    scores = np.where(np.isnan(scores), -np.inf, scores)  # a duplicate, which has no score of its own
    weights = PrototypeGate(temperature, top_k).weights(scores)
    return replace(run, weights=weights, clusters=cluster(weights, n_variants, run.settings.seed))


def figures_table(runs: Mapping[Any, Run]) -> pd.DataFrame:
    """The decisions of several runs in a few numbers, a row for each; a mix answers a shared query."""
    rows = {}
    for name, run in runs.items():
        mixes = run.mixes
        tops = run.weights.max(1)
        lost = losses(mixes, run.clusters)
        rows[name] = {
            "variants": len(run.clusters.weights),
            "shared queries": (mixes.max(1) < 1).sum(),
            "top weight, mean": tops.mean(),
            "left to the base model": (run.weights.argmax(1) == len(run.names) - 1).sum(),
            "mean loss": lost.mean(),
            "worst loss": lost.max(),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def loss_curve(run: Run) -> pd.DataFrame:
    """Mean and worst loss of the run's mixes by number of variants."""
    mixes = run.mixes
    distinct = len(np.unique(mixes.round(6), axis=0))
    lost = {k: losses(mixes, cluster(mixes, k, seed=0, sharp=False)) for k in KS if k <= distinct}
    rows = {k: {"mean": each.mean(), "worst": each.max()} for k, each in lost.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variants")


# Two decisions


def compare(one: Run, two: Run) -> pd.DataFrame:
    """The queries of two runs, A and B, most different first.

    Distances are total variation: between a query's own weights, and between the mixes that answered it.

    Raises:
        InputError: the runs are not on the same queries.
    """
    both = joined(one, two)
    names = list(dict.fromkeys([*one.names, *two.names]))

    def aligned(run: Run, rows: Array) -> pd.DataFrame:
        return pd.DataFrame(rows, run.keys, run.names).reindex(both.index, columns=names, fill_value=0)

    a, b = (aligned(run, run.weights) for run in (one, two))
    answered, other = (aligned(run, run.clusters.weights[run.labels]) for run in (one, two))
    both["weights apart"] = (a - b).abs().sum(axis=1) / 2
    both["variants apart"] = (answered - other).abs().sum(axis=1) / 2
    both["A"], both["B"] = ([mix(names, row) for row in weights.to_numpy()] for weights in (a, b))
    both["same top"] = a.idxmax(axis=1) == b.idxmax(axis=1)
    shown = ["weights apart", "variants apart", "A", "B", "same top", "variant A", "variant B"]
    return both[shown].sort_values("weights apart", ascending=False, kind="stable")
