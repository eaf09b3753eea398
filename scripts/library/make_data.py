"""Writes the query files from the tasks: `python -m scripts.library.make_data`.

- data/test.csv: unlabelled, about 12 of each task, phrased as in training and otherwise, shuffled.
- data/eval/TASK.csv: labelled, phrased as in training.
- data/eval_unseen/TASK.csv: labelled, phrased as never in training, and the tasks without adapter.

Labelled files have the starter kit's columns, the name of the task's own adapter (`base` where
there is none), its skill, and the number of the phrasing.
"""

import argparse
import random
from pathlib import Path

from router.constants import BASE_COLUMN
from router.queries.submission import GENERATION, MULTIPLE_CHOICE, write_table
from scripts.library.tasks import Item, Task, all_tasks, reworded, split
from scripts.library.train import SEED, SIZES, phrase

LABELLED = ("id", "input", "target", "answer_choices", "eval_type", "adapter", "skill", "phrasing")
DATA = Path("data")
Forms = tuple[str, ...]


def asked(item: Item) -> tuple[str, object]:
    """The columns `eval_type` and `answer_choices`."""
    return (MULTIPLE_CHOICE, list(item.choices)) if item.choices else (GENERATION, "")


def write_labelled(folder: Path, task: Task, items: list[Item], prompts: list[str], forms: Forms) -> None:
    """Writes a task's labelled items; each prompt is one of the forms, filled."""
    rows: list[list[object]] = []
    adapter = task.name if task.phrasings else BASE_COLUMN
    for n, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        form = next(k for k, text in enumerate(forms) if text.format(**item.fields) == prompt)
        kind, choices = asked(item)
        rows.append([n, prompt, item.target, choices, kind, adapter, task.skill, form])
    write_table(folder / f"{task.name}.csv", LABELLED, rows)


def main() -> None:
    """Writes all files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    unlabelled: list[list[object]] = []
    for task in all_tasks().values():
        sizes = SIZES if task.phrasings else {part: SIZES[part] for part in ("unseen", "test")}
        parts = split(task, SEED, sizes)
        unseen = parts["unseen"]
        write_labelled(DATA / "eval_unseen", task, unseen, reworded(task, unseen), task.unseen)
        if task.phrasings:
            prompts, own = phrase(task, parts["eval"])
            write_labelled(DATA / "eval", task, own, prompts, task.phrasings)
        forms = [*task.phrasings, *task.unseen]
        for n, item in enumerate(parts["test"]):
            unlabelled.append([forms[n % len(forms)].format(**item.fields), *asked(item)])
    random.Random(SEED).shuffle(unlabelled)
    header = ("id", "input", "eval_type", "answer_choices")
    write_table(DATA / "test.csv", header, ([n, *row] for n, row in enumerate(unlabelled)))


if __name__ == "__main__":
    main()
