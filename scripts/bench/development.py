"""The libraries that choices are made on, with labelled queries: those of them that are at hand.

No constant is chosen by one library. Two are in every clone: `data/library`, and the foreign queries of
data/eval_foreign that no adapter of any was made for. The others are found where they were made: `families`
and `otherbase` by `python -m scripts.library.development`, `second` beside the repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from router.constants import BASE_COLUMN, LIBRARY
from router.model.base import EMBEDDED
from scripts.bench.score import labelled, read_texts

COMMITTED = "committed"  # data/library
BUILT = Path("output/development")
SECOND = Path("../shared/devset")
# own phrasing, other phrasings, multiple choice, none of the library's tasks, and of no library's
SPLITS = ("own", "unseen", "mc", "none", "foreign")


@dataclass(frozen=True)
class Labelled:
    """A library and queries of which the right adapter is known.

    Attributes:
        name: of the library.
        adapters: its folder.
        base: what `load_base` takes.
        rows: one a query, with the columns id, task, split (of SPLITS), input, eval_type, answer_choices,
            target, metric, and adapter (`base` where none fits).
    """

    name: str
    adapters: Path
    base: str
    rows: pd.DataFrame


def libraries() -> Iterator[Labelled]:
    """Those at hand, the committed one last."""
    if SECOND.is_dir():
        yield _of_folder("second", SECOND)
    for name in ("families", "otherbase"):
        if (BUILT / name / "queries.csv").exists():
            yield _of_folder(name, BUILT / name)
    own, unseen = labelled("eval"), labelled("eval_unseen")
    foreign = unseen["adapter"] == BASE_COLUMN
    rows = [own.assign(split="own"), unseen.assign(split=foreign.map({True: "none", False: "unseen"}))]
    yield _of(COMMITTED, LIBRARY, EMBEDDED, pd.concat(rows).assign(metric="exact"))


def _of_folder(name: str, folder: Path) -> Labelled:
    """A library in a folder of its own: library/, queries.csv, labels.csv, and base/ if it has its own."""
    rows = read_texts(folder / "queries.csv").merge(read_texts(folder / "labels.csv"), on="id")
    rows["adapter"] = rows["task"].where(rows["split"] != "none", BASE_COLUMN)
    base = folder / "base"
    return _of(name, folder / "library", str(base) if base.is_dir() else EMBEDDED, rows)


def _of(name: str, adapters: Path, base: str, rows: pd.DataFrame) -> Labelled:
    columns = ["id", "task", "split", "input", "eval_type", "answer_choices", "target", "metric", "adapter"]
    foreign = labelled("eval_foreign").assign(split="foreign")
    return Labelled(name, adapters, base, pd.concat([rows, foreign], ignore_index=True)[columns])
