"""What notebooks/clusters.ipynb shows of a finished run, as tables: loads no model and draws nothing.

A run can be replayed from its evidence at another temperature, top_k or number of variants, since these come
after everything that needs the model.
"""

from __future__ import annotations

from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from router.clusters import Array, Clusters, cluster, losses
from router.errors import InputError
from router.gate import weights_of
from router.report import Labels, Run, load, mix, places_of

KS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # of the curve
SHORT = 70  # characters of a query


class NotShown(InputError):
    """What a notebook says, in one line and without a traceback, when it cannot show a run."""

    def _render_traceback_(self) -> list[str]:  # what IPython asks for
        return [f"error: {self}"]


@dataclass(frozen=True)
class Decision:
    """Weights of queries and their groups, as a run made them or as other settings would.

    Attributes:
        queries: `STEM:ID` of each.
        names: the candidates, adapters and then the base model.
        weights: (queries, candidates).
        clusters: the groups.
    """

    queries: list[str]
    names: list[str]
    weights: Array
    clusters: Clusters

    def figures(self) -> dict[str, float]:
        """The decision in a few numbers; a shared query has no candidate above half of its weight."""
        lost, sure = losses(self.weights, self.clusters), self.weights.max(1)
        return {
            "variants": len(self.clusters.weights),
            "shared queries": int((sure <= 0.5).sum()),
            "heaviest weight, mean": float(sure.mean()),
            "left to the base model": int((self.weights.argmax(1) == len(self.names) - 1).sum()),
            "mean loss": float(lost.mean()),
            "worst loss": float(lost.max()),
        }


def open_run(folder: str | Path, evidence: bool = True) -> Run:
    """Reads a finished run, and its query files where they still are.

    A relative folder, and relative paths in run.json, are looked for here and in the folders above, so
    that a notebook finds what was written from the root of the repository.

    Raises:
        NotShown: there is no run, or it has no routing table, or no evidence though that is needed.
    """
    here = [Path.cwd(), *Path.cwd().parents]
    found = next((place / folder for place in here if (place / folder / "run.json").is_file()), None)
    if found is None:
        raise NotShown(f"{folder}: expected the folder of a finished run, found no run.json; set RUN")
    runs = []
    try:
        for place in here:
            with chdir(place):
                runs.append(load(found))
    except InputError as error:
        raise NotShown(str(error)) from None
    run = min(runs, key=lambda run: len(run.notes))
    if not run.names or (evidence and run.evidence is None):
        kind, method = "evidence" if run.names else "a routing table", run.record["method"]
        raise NotShown(f"{folder}: expected {kind}, but the method {method} keeps none; choose another run")
    return run


def keys(run: Run) -> list[str]:
    """`STEM:ID` of each query, as `python -m router.explain` takes it."""
    return [f"{Path(run.files[row.file]).stem}:{row.id}" for row in run.rows]


# What the run decided


def decided(run: Run) -> Decision:
    """The weights and groups that the run wrote."""
    return Decision(keys(run), run.names, run.weights, run.clusters)


def overview(run: Run) -> pd.DataFrame:
    """The run in a few lines."""
    record, flags = run.record, run.record["flags"]
    rows = {
        "method": record["method"],
        "base model": record["base"]["name"],
        "query files": ", ".join(Path(name).name for name in run.files),
        "queries": len(run.rows),
        "adapters": len(run.names) - 1,
        "variants": len(record["variants"]),
        "guesses": int(run.guesses.sum()),
        "temperature, top_k": f"{flags['temperature']}, {flags['top_k']}",
        "seconds": round(sum(record["seconds"].values())),
    }
    return pd.DataFrame({"": rows.values()}, index=list(rows), dtype=object)


def adapter_table(run: Run) -> pd.DataFrame:
    """Of each candidate: queries where it is heaviest, its share of all weight, variants that it is in."""
    found = pd.DataFrame(index=run.names)
    found["heaviest for"] = np.bincount(run.weights.argmax(1), minlength=len(run.names))
    found["share of all weight"] = run.weights.mean(0)
    found["in variants"] = (run.clusters.weights > 0).sum(0)
    return found.sort_values("heaviest for", ascending=False, kind="stable")


def variant_table(run: Run) -> pd.DataFrame:
    """Each variant, largest first: its queries, mix and loss, two typical queries and the farthest."""
    own, lost = run.clusters.weights, losses(run.weights, run.clusters)
    rows = {}
    for n in np.argsort(-np.bincount(run.labels, minlength=len(own)), kind="stable").tolist():
        members = np.flatnonzero(run.labels == n)
        lines = [run.rows[k].line(SHORT) for k in members[np.argsort(lost[members], kind="stable")]]
        rows[n] = {
            "queries": len(members),
            "mix": mix(run.names, own[n]),
            "mean loss": lost[members].mean(),
            "typical": lines[0],
            "another": lines[1] if len(lines) > 2 else "",
            "farthest": lines[-1] if len(lines) > 1 else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant")


def mix_table(run: Run) -> pd.DataFrame:
    """Variants by candidates, sorted so that the heaviest weights run down the diagonal."""
    own = run.clusters.weights
    order = np.lexsort((-own.max(1), own.argmax(1)))
    used = [name for name, column in zip(run.names, own.T, strict=True) if (column >= 0.005).any()]
    return pd.DataFrame(own, columns=run.names)[used].iloc[order]


def unsure_table(run: Run) -> pd.DataFrame:
    """All queries, least sure first: by how far the best candidate is ahead of the next."""
    found = pd.DataFrame({"query": [row.line(SHORT) for row in run.rows]}, keys(run))
    assert run.evidence is not None
    found["ahead"] = run.evidence.lead
    found["weights"] = [mix(run.names, row) for row in run.weights]
    found["variant"] = run.labels
    return found.sort_values("ahead", kind="stable")


def vote_table(run: Run, adapter: str | None = None) -> pd.DataFrame:
    """Mean vote by layer and kind of module: of all queries, or of those where this adapter scores best.

    Raises:
        NotShown: no such adapter.
    """
    assert run.evidence is not None
    if adapter is not None and adapter not in run.evidence.adapters:
        raise NotShown(f"expected one of the adapters {', '.join(run.evidence.adapters)}, got {adapter!r}")
    votes = run.evidence.votes
    if adapter is not None:
        best = np.nan_to_num(run.evidence.scores, nan=-np.inf).argmax(1)
        votes = votes[best == run.evidence.adapters.index(adapter)]
    layers, kinds = (np.tile(part, len(votes)) for part in places_of(run.evidence.modules))
    found = pd.Series(votes.ravel()).groupby([layers, kinds]).mean()
    return found.unstack().rename_axis(index="layer", columns="module")


# What other settings would decide


def settings_of(run: Run) -> dict[str, Any]:
    """The settings of the run that `replay` can change."""
    return {name: run.record["flags"][name] for name in ("temperature", "top_k", "n_variants")}


def replay(run: Run, temperature: float, top_k: int | None, n_variants: int | None) -> Decision:
    """Decides anew from the evidence, as a run with these settings would."""
    assert run.evidence is not None
    scores = run.evidence.candidates.astype(np.float64)
    scores = np.where(np.isnan(scores), -np.inf, scores)  # a copy, for which another adapter stands
    weights = weights_of(scores, temperature, top_k)
    clusters = cluster(weights, n_variants, int(run.record["flags"]["seed"]))
    return Decision(keys(run), run.names, weights, clusters)


def figures_table(decisions: dict[Any, Decision]) -> pd.DataFrame:
    """The figures of several decisions, one a row."""
    return pd.DataFrame.from_dict({name: d.figures() for name, d in decisions.items()}, orient="index")


def loss_curve(decision: Decision, seed: int = 0) -> pd.DataFrame:
    """Mean and worst loss of the decision's weights by number of variants."""
    distinct = len(np.unique(decision.weights.round(6), axis=0))
    tried = ((k, losses(decision.weights, cluster(decision.weights, k, seed))) for k in KS if k <= distinct)
    rows = {k: {"mean": lost.mean(), "worst": lost.max()} for k, lost in tried}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variants")


# Two decisions


def compare(first: Decision, second: Decision) -> pd.DataFrame:
    """The queries that both know, most different first.

    Distances are total variation: between the queries' own weights, and between the mixes that answer them.

    Raises:
        NotShown: they have no query in common.
    """
    known = set(second.queries)
    queries = [key for key in first.queries if key in known]
    if not queries:
        raise NotShown("expected two runs over the same queries, but these have none in common")
    names = list(dict.fromkeys([*first.names, *second.names]))
    (a, answered, groups), (b, other, others) = (_aligned(of, queries, names) for of in (first, second))
    found = pd.DataFrame({"weights apart": np.abs(a - b).sum(1) / 2}, queries)
    found["variants apart"] = np.abs(answered - other).sum(1) / 2
    found["A"], found["B"] = ([mix(names, row) for row in own] for own in (a, b))
    found["same heaviest"] = a.argmax(1) == b.argmax(1)
    found["variant A"], found["variant B"] = groups, others
    return found.sort_values("weights apart", ascending=False, kind="stable")


def _aligned(decision: Decision, queries: list[str], names: list[str]) -> tuple[Array, Array, Labels]:
    """Weights of these queries and of the variants that answer them, a column for each name; the variants."""
    rows = pd.Index(decision.queries).get_indexer(pd.Index(queries))
    groups = decision.clusters.labels[rows]
    own, answered = np.zeros((2, len(queries), len(names)))
    columns = [names.index(name) for name in decision.names]
    own[:, columns], answered[:, columns] = decision.weights[rows], decision.clusters.weights[groups]
    return own, answered, groups
