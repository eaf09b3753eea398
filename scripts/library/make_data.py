"""Writes the query files from the tasks: `python -m scripts.library.make_data`.

- data/test.csv: unlabelled, about 12 of each task, phrased as in training and otherwise, shuffled.
- data/eval/TASK.csv: labelled, phrased as in training.
- data/eval_unseen/TASK.csv: labelled, phrased as never in training, and the tasks without adapter.
- data/eval_composite/TASK.csv: labelled, tasks that need two adapters.

Labelled files have the starter kit's columns, the name of the task's own adapter (`base` where
there is none, both names joined by `+` where it needs two), its skill, and the number of the phrasing.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from router.constants import BASE_COLUMN
from router.queries.submission import GENERATION, MULTIPLE_CHOICE, write_table
from scripts.library.tasks import Item, Task, all_tasks, composite_tasks, split
from scripts.library.train import EXPERTS, SEED, SIZES, phrase

LABELLED = ("id", "input", "target", "answer_choices", "eval_type", "adapter", "skill", "phrasing")
DATA = Path("data")


def asked(item: Item) -> tuple[str, object]:
    """The columns `eval_type` and `answer_choices`."""
    return (MULTIPLE_CHOICE, list(item.choices)) if item.choices else (GENERATION, "")


def labelled(task: Task, items: list[Item], prompts: list[str], phrasings: list[int]) -> list[list[object]]:
    """Rows of a labelled file."""
    adapter = task.name if task.has_adapter else "+".join(task.experts) or BASE_COLUMN
    rows: list[list[object]] = []
    for n, (item, prompt, phrasing) in enumerate(zip(items, prompts, phrasings, strict=True)):
        kind, choices = asked(item)
        rows.append([n, prompt, item.target, choices, kind, adapter, task.skill, phrasing])
    return rows


def write_unseen(folder: Path, task: Task, items: list[Item]) -> None:
    """Writes a task's labelled items, its phrasings never used in training taking turns."""
    numbers = [n % len(task.unseen) for n in range(len(items))]
    prompts = [task.unseen[k].format(**item.fields) for k, item in zip(numbers, items, strict=True)]
    write_table(folder / f"{task.name}.csv", LABELLED, labelled(task, items, prompts, numbers))


def main() -> None:
    """Writes all files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    unlabelled: list[list[object]] = []
    for task in all_tasks().values():
        if task.has_adapter and task.name not in EXPERTS:
            continue
        sizes = SIZES if task.phrasings else {part: SIZES[part] for part in ("unseen", "test")}
        parts = split(task, SEED, sizes)
        write_unseen(DATA / "eval_unseen", task, parts["unseen"])
        if task.phrasings:
            own = phrase(task, parts["eval"], SEED)
            numbers = [
                next(k for k, text in enumerate(task.phrasings) if text.format(**item.fields) == prompt)
                for item, prompt in zip(parts["eval"], own, strict=True)
            ]
            write_table(
                DATA / "eval" / f"{task.name}.csv", LABELLED, labelled(task, parts["eval"], own, numbers)
            )
        forms = [*task.phrasings, *task.unseen]
        for n, item in enumerate(parts["test"]):
            unlabelled.append([forms[n % len(forms)].format(**item.fields), *asked(item)])
    random.Random(SEED).shuffle(unlabelled)
    header = ("id", "input", "eval_type", "answer_choices")
    write_table(DATA / "test.csv", header, ([n, *row] for n, row in enumerate(unlabelled)))
    for task in composite_tasks().values():
        items = split(task, SEED, {"unseen": SIZES["unseen"]})["unseen"]
        write_unseen(DATA / "eval_composite", task, items)


if __name__ == "__main__":
    main()
