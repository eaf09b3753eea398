"""What is right: an answer, and the adapter that a query went to; and the labelled files under data/."""

import math
import re
from pathlib import Path

import pandas as pd

from router.queries.submission import adapters_of

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


def labelled(folder: str) -> pd.DataFrame:
    """All rows of a folder of labelled files under data/, each with its task."""
    files = sorted((DATA / folder).glob("*.csv"))
    return pd.concat([read_texts(file).assign(task=file.stem) for file in files], ignore_index=True)
