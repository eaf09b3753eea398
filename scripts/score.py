"""Scores finished runs against labels: `python -m scripts.score data/eval output/eval/*`.

Prints, per task, each run's share of right answers; below, the mean over tasks, the share of the
oracle's mean, and how often the heaviest weight is the task's own adapter. Reads labels, so
nothing under router/ or merge/ may import it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd

TEXT = {"dtype": str, "keep_default_na": False}


def score_run(labels: Path, run: Path) -> pd.DataFrame:
    """One row per task that the run answered: skill, score and routing accuracy, both in [0, 1].

    Routing accuracy is NaN where the run wrote no routing table.
    """
    rows = []
    for file in sorted(labels.glob("*.csv")):
        if not (run / file.name).exists():
            continue
        truth = pd.read_csv(file, index_col="id", **TEXT)
        found = pd.read_csv(run / file.name, index_col="id", **TEXT).loc[truth.index]
        right = found["prediction"].str.strip() == truth["target"]
        row = {"task": file.stem, "skill": truth["skill"].iloc[0], "score": right.mean()}
        routing = run / f"{file.stem}.routing.csv"
        if routing.exists():
            weights = pd.read_csv(routing, dtype={"id": str}).set_index("id").drop(columns="variant")
            row["routed"] = (weights.loc[truth.index].idxmax(axis=1) == truth["adapter"]).mean()
        rows.append(row)
    return pd.DataFrame(rows, columns=["task", "skill", "score", "routed"]).set_index("task")


def table(labels: Path, runs: list[Path]) -> str:
    """The Markdown table of several runs on the same tasks, a column each.

    A column has the name of its run's method, and the run's folder where several are of one method.
    """
    methods = [json.loads((run / "run.json").read_text("utf-8"))["method"] for run in runs]
    scored = {
        method if methods.count(method) == 1 else f"{method}, {run}": score_run(labels, run)
        for method, run in zip(methods, runs, strict=True)
    }
    scores = pd.DataFrame({name: found["score"] for name, found in scored.items()}).sort_index()
    skills = pd.concat([found["skill"] for found in scored.values()]).groupby(level=0).first()
    lines = [f"| task | skill | {' | '.join(scores)} |", "| --- | --- |" + " ---: |" * len(scored)]
    for task, row in scores.iterrows():
        lines.append(f"| {task} | {skills[task]} | " + " | ".join(f"{value:.2f}" for value in row) + " |")
    mean = scores.mean()
    lines.append("| **mean over tasks** | | " + " | ".join(f"{value:.3f}" for value in mean) + " |")
    if "oracle" in mean:
        share = mean / mean["oracle"]
        lines.append("| share of the oracle | | " + " | ".join(f"{value:.3f}" for value in share) + " |")
    routed = (found["routed"].mean() for found in scored.values())
    lines.append("| routing accuracy | | " + " | ".join(f"{value:.3f}" for value in routed) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("labels", type=Path, help="folder of labelled CSV files, one per task")
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of runs on these files")
    args = parser.parse_args()
    for run in args.runs:
        if not (run / "run.json").exists():
            parser.error(f"{run}: expected the output folder of a finished run (no run.json there)")
    print(table(args.labels, args.runs))


if __name__ == "__main__":
    main()
