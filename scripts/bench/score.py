"""What is right, and how finished runs did: `python -m scripts.bench.score data/eval output/eval/*`.

Prints, per task, each run's share of right answers; below, the mean over tasks, the share of the oracle's
mean, and how often the top candidate is the task's own adapter.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from statistics import fmean

import pandas as pd

from router.queries.submission import adapters_of
from scripts.bench.markdown import header, row

DATA = Path("data")
COPY = "~"  # in the name of a copy, between that of its adapter and what was done to it


def right(prediction: str, target: str) -> bool:
    """Whether an answer is right: the target exactly, but for blanks around it."""
    return prediction.strip() == target


def score(metric: str, prediction: str, target: str) -> float:
    """How good an answer is, in [0, 1].

    Args:
        metric: `exact` and `mc`: the target, but for blanks around it. `em`: its first line, in any case of
            letters. `contains`: it has one of the alternatives `a|b`; one of up to three letters as a whole
            word. `rougeL`: the F-measure of the package rouge-score. `none`: nobody knows, NaN.
    """
    match metric:
        case "exact" | "mc":
            return float(right(prediction, target))
        case "em":
            return float(_first_line(prediction) == _first_line(target))
        case "contains":
            return float(any(_holds(prediction.lower(), part.lower()) for part in target.split("|")))
        case "rougeL":
            from rouge_score.rouge_scorer import RougeScorer

            return float(RougeScorer(["rougeL"]).score(target, prediction)["rougeL"].fmeasure)
        case "none":
            return math.nan
    raise ValueError(f"expected exact, mc, em, contains, rougeL or none, got {metric!r}")


def reference(metric: str, target: str) -> str:
    """The one text of a target that a likelihood is asked of; empty where nobody knows.

    Example:
        >>> reference("contains", "a|b"), reference("exact", "ls | wc")
        ('a', 'ls | wc')
    """
    if metric == "none":
        return ""
    return target.split("|")[0] if metric == "contains" else target


def _first_line(text: str) -> str:
    return text.strip().lower().split("\n")[0].strip()


def _holds(text: str, part: str) -> bool:
    if len(part) > 3:
        return part in text
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", text) is not None


def routed(top: str, adapter: str) -> bool:
    """Whether the top candidate is the labelled adapter, one of several joined by `+`, or a copy of one."""
    return top.split(COPY, 1)[0] in adapters_of(adapter)


def read_texts(path: Path) -> pd.DataFrame:
    """A CSV file in which everything is text, `NA` and nothing too."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def labelled(folder: str, rows_per_task: int | None = None) -> pd.DataFrame:
    """All rows of a folder of labelled files under data/, each with its task."""
    files = sorted((DATA / folder).glob("*.csv"))
    parts = [read_texts(file).assign(task=file.stem)[:rows_per_task] for file in files]
    return pd.concat(parts, ignore_index=True)


def score_run(labels: Path, run: Path) -> pd.DataFrame:
    """One row per task that the run answered: skill, score and routing accuracy, both in [0, 1].

    Routing accuracy is NaN where the run wrote no routing table.
    """
    rows = []
    for file in sorted(labels.glob("*.csv")):
        if not (run / file.name).exists():
            continue
        truth = read_texts(file).set_index("id")
        answers = read_texts(run / file.name).set_index("id").loc[truth.index, "prediction"]
        scored = {"task": file.stem, "skill": truth["skill"].iloc[0]}
        scored["score"] = fmean([right(*pair) for pair in zip(answers, truth["target"], strict=True)])
        routing = run / f"{file.stem}.routing.csv"
        if routing.exists():
            weights = pd.read_csv(routing, dtype={"id": str}).set_index("id").drop(columns="variant")
            tops = weights.loc[truth.index].idxmax(axis=1).astype(str)
            scored["routed"] = fmean([routed(*pair) for pair in zip(tops, truth["adapter"], strict=True)])
        rows.append(scored)
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
    lines = header(["task", "skill", *scores], texts=2)
    for task, values in scores.iterrows():
        lines.append(row(task, skills[task], *(f"{value:.2f}" for value in values)))
    mean = scores.mean()
    lines.append(row("**mean over tasks**", "", *(f"{value:.3f}" for value in mean)))
    if "oracle" in mean:
        lines.append(row("share of the oracle", "", *(f"{value:.3f}" for value in mean / mean["oracle"])))
    accuracies = (found["routed"].mean() for found in scored.values())
    lines.append(row("routing accuracy", "", *(f"{value:.3f}" for value in accuracies)))
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
