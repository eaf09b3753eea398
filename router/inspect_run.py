"""What notebooks/clusters.ipynb shows of a finished run, as tables: loads no model and draws nothing.

The run's files are read by router/report.py. A run can be replayed from its evidence at another temperature,
top_k or number of variants, since these come after everything that needs the model.
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
from router.report import Run, load, place_of, variant_weights

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

    @property
    def heaviest(self) -> list[str]:
        """The heaviest candidate of each query."""
        return [self.names[n] for n in self.weights.argmax(1)]

    @property
    def losses(self) -> Array:
        """Total variation distance of each query's weights to its variant's."""
        return losses(self.weights, self.clusters)

    def figures(self) -> dict[str, float]:
        """The decision in a few numbers; a guess has no candidate above half of the weight."""
        return {
            "variants": len(self.clusters.weights),
            "guesses": int((self.weights.max(1) <= 0.5).sum()),
            "heaviest weight, mean": float(self.weights.max(1).mean()),
            "left to the base model": int((self.weights.argmax(1) == len(self.names) - 1).sum()),
            "mean loss": float(self.losses.mean()),
            "worst loss": float(self.losses.max()),
        }


def open_run(folder: str | Path, evidence: bool = True) -> Run:
    """Reads a finished run, and its query files where they still are.

    A relative folder, and relative paths in run.json, are looked for here and in the folders above, so
    that a notebook finds what was written from the root of the repository.

    Raises:
        NotShown: there is no run, or it has no routing table, or no evidence though that is needed.
    """
    here, found = Path.cwd(), None
    for place in (here, *here.parents):
        if (place / folder / "run.json").is_file():
            try:
                with chdir(place):
                    run = load(Path(folder))
            except InputError as error:
                raise NotShown(str(error)) from None
            if found is None or not run.notes:
                found = run
            if not run.notes:
                break
    if found is None:
        raise NotShown(
            f"{folder}: expected the output folder of a finished run, found no run.json there; "
            "make a run with `python -m router.main -m proto_route`, or set RUN"
        )
    method = found.record["method"]
    if not found.names:
        raise NotShown(f"{folder}: expected a routing table, but the method {method} writes none")
    if evidence and found.evidence is None:
        raise NotShown(
            f"{folder}: expected a run with evidence (*.evidence.safetensors), found a run of the method "
            f"{method} without; choose a run of proto_route"
        )
    return found


def keys(run: Run) -> list[str]:
    """`STEM:ID` of each query, as `python -m router.explain` takes it."""
    return [f"{Path(run.files[row.file]).stem}:{row.id}" for row in run.rows]


def texts(run: Run) -> list[str]:
    """The start of each query on one line; its id where the text is gone."""
    lines = [row.id if row.text is None else " ".join(row.text.split()) for row in run.rows]
    return [line if len(line) <= SHORT else f"{line[: SHORT - 1]}…" for line in lines]


def mix(names: list[str], weights: Array, most: int = 3) -> str:
    """The heaviest candidates in words; those below 0.005 are left out."""
    heavy = [n for n in np.argsort(-weights, kind="stable")[:most] if weights[n] >= 0.005]
    return ", ".join(f"{names[n]} {weights[n]:.2f}" for n in heavy)


# What the run decided


def decided(run: Run) -> Decision:
    """The weights and groups that the run wrote."""
    return Decision(keys(run), run.names, run.weights, Clusters(run.labels, variant_weights(run)))


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
    heaviest = np.bincount(run.weights.argmax(1), minlength=len(run.names))
    found = pd.DataFrame(
        {
            "heaviest for": heaviest,
            "share of all weight": run.weights.mean(0),
            "in variants": (variant_weights(run) > 0).sum(0),
        },
        index=run.names,
    )
    return found.sort_values("heaviest for", ascending=False, kind="stable")


def variant_table(run: Run) -> pd.DataFrame:
    """Each variant, largest first: its queries, mix and loss, two typical queries and the farthest."""
    own, lost, lines = variant_weights(run), decided(run).losses, texts(run)
    rows = {}
    for n in np.argsort(-np.bincount(run.labels, minlength=len(own)), kind="stable").tolist():
        members = np.flatnonzero(run.labels == n)
        members = members[np.argsort(lost[members], kind="stable")]
        rows[n] = {
            "queries": len(members),
            "mix": mix(run.names, own[n]),
            "mean loss": lost[members].mean() if len(members) else np.nan,
            "typical": lines[members[0]] if len(members) else "",
            "another": lines[members[1]] if len(members) > 2 else "",
            "farthest": lines[members[-1]] if len(members) > 1 else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variant")


def mix_table(run: Run) -> pd.DataFrame:
    """Variants by candidates, sorted so that the heaviest weights run down the diagonal."""
    own = variant_weights(run)
    order = np.lexsort((-own.max(1), own.argmax(1)))
    used = [name for name, column in zip(run.names, own.T, strict=True) if (column >= 0.005).any()]
    return pd.DataFrame(own, columns=run.names)[used].iloc[order]


def unsure_table(run: Run) -> pd.DataFrame:
    """All queries, least sure first, with their heaviest weights."""
    found = pd.DataFrame(
        {
            "query": texts(run),
            "heaviest": run.weights.max(1),
            "weights": [mix(run.names, row) for row in run.weights],
            "variant": run.labels,
        },
        index=keys(run),
    )
    return found.sort_values("heaviest", kind="stable")


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
    parts = [place_of(module) for module in run.evidence.modules]
    several = len({before for before, _, _ in parts}) > 1  # towers of their own
    layers = [int(number or -1) for _, number, _ in parts]
    kinds = [f"{before}: {kind}" if several else kind for before, _, kind in parts]
    places = np.tile(np.arange(len(parts)), len(votes))
    found = pd.Series(votes.ravel()).groupby([np.take(layers, places), np.take(kinds, places)]).mean()
    return found.unstack().rename_axis(index="layer", columns="module")


# What other settings would decide


def settings_of(run: Run) -> dict[str, Any]:
    """The settings of the run that `replay` can change."""
    return {name: run.record["flags"][name] for name in ("temperature", "top_k", "n_variants")}


def replay(run: Run, temperature: float, top_k: int | None, n_variants: int | None) -> Decision:
    """Decides anew from the evidence.

    Args:
        run: one with evidence.
        temperature: of the softmax, in standard deviations of generic text.
        top_k: at most this many adapters keep a weight; None: all.
        n_variants: how many; None: as few as keep the losses low.

    Raises:
        ValueError: a setting out of its range.
    """
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
    rows = {}
    for k in (k for k in KS if k <= distinct):
        lost = losses(decision.weights, cluster(decision.weights, k, seed))
        rows[k] = {"mean": lost.mean(), "worst": lost.max()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("variants")


# Two decisions


def compare(first: Decision, second: Decision) -> pd.DataFrame:
    """The queries that both know, most different first.

    Distances are total variation: between the queries' own weights, and between the mixes that answer them.

    Raises:
        NotShown: they have no query in common.
    """
    places: dict[str, int] = {key: n for n, key in enumerate(second.queries)}
    pairs = [(n, places[key]) for n, key in enumerate(first.queries) if key in places]
    if not pairs:
        raise NotShown("expected two runs over the same queries, but these have none in common")
    mine, theirs = np.array(pairs).T
    names = list(dict.fromkeys([*first.names, *second.names]))
    groups, others = first.clusters.labels[mine], second.clusters.labels[theirs]
    a, b = _aligned(first, first.weights, names)[mine], _aligned(second, second.weights, names)[theirs]
    answered = _aligned(first, first.clusters.weights, names)[groups]
    answered -= _aligned(second, second.clusters.weights, names)[others]
    found = pd.DataFrame(
        {
            "weights apart": np.abs(a - b).sum(1) / 2,
            "variants apart": np.abs(answered).sum(1) / 2,
            "A": [mix(names, row) for row in a],
            "B": [mix(names, row) for row in b],
            "same heaviest": a.argmax(1) == b.argmax(1),
            "variant A": groups,
            "variant B": others,
        },
        index=[first.queries[n] for n in mine],
    )
    return found.sort_values("weights apart", ascending=False, kind="stable")


def _aligned(decision: Decision, weights: Array, names: list[str]) -> Array:
    """Weights with a column for each name, zero where the decision has no such candidate."""
    out = np.zeros((len(weights), len(names)))
    out[:, [names.index(name) for name in decision.names]] = weights
    return out
