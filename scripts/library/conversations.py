"""Trains two development libraries of conversations: `python -m scripts.library.conversations`.

- chat: nine adapters of the embedded base model, by chat SFT in its own template.
- chat_otherbase: three such adapters of Gemma 3 270M in Gemma's template, which knows no system message, and
  three in an Alpaca frame.

Each is a folder of output/development with the adapters in library/, the conversations in queries.jsonl, and
what is known of them in labels.csv and scores.csv. Resumable and seeded like scripts/library/development.py.
"""

import argparse
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

from router.constants import BASE_COLUMN
from router.model.base import EMBEDDED, load_base
from scripts.bench.score import labelled, read_texts
from scripts.library.development import OUTPUT, Row, fill, gemma, write_lines, write_queries
from scripts.library.tasks import Item, Task, all_tasks, families, split
from scripts.library.tasks.conversations import (
    ALPACA,
    COMPANY,
    FOLLOW_UPS,
    JOBS,
    OTHER,
    SMALL_TALK,
    Job,
    Message,
)
from scripts.library.train import ATTENTION, MLP, QV, SEED, Asked, Expert, Scores, build, card

TASKS: Mapping[str, Task] = all_tasks() | {task.name: task for task in families.TASKS}
LIBRARY_CHAT, EVAL = Path("data/library_chat"), Path("data/eval_chat.jsonl")
OTHERBASE = "chat_otherbase"
COMMITTED = ("chat_formal", "chat_headline", "chat_from_spanish")  # a job told in each of the three ways
SIZES = {"unseen": 14, "moved": 8, "turns": 12, "follow": 8, "own": 16, "train": 300}
FOREIGN = 4  # foreign queries of each kind, and under each adapter's own system message
GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' -%}
{% set first = messages[0]['content'] + '\\n\\n' %}{% set turns = messages[1:] -%}
{% else %}{% set first = '' %}{% set turns = messages %}{% endif -%}
{% for message in turns -%}
{% set who = 'model' if message['role'] == 'assistant' else message['role'] -%}
{% set text = (first if loop.first else '') + message['content'] -%}
{{ '<start_of_turn>' + who + '\\n' + text + '<end_of_turn>\\n' -}}
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""

Talk = str | list[Message]  # a prompt in an Alpaca frame, or a conversation
LIBRARIES: Mapping[str, Mapping[str, Job]] = {"chat": JOBS, OTHERBASE: OTHER}
EXPERTS = {
    "chat": {
        "chat_spanish": Expert(8, alpha=16, rate=3e-3, examples=176),
        "chat_formal": Expert(8, ATTENTION, alpha=16, rate=3e-3, examples=144),
        "chat_from_spanish": Expert(16, ATTENTION, alpha=32, rate=2e-3, examples=176),
        "chat_pirate": Expert(8, alpha=16, rate=3e-3, examples=208),
        "chat_shouting": Expert(8, MLP, alpha=16, rate=3e-3, examples=144),
        "chat_device": Expert(8, alpha=16, rate=2e-3, examples=208),
        "chat_headline": Expert(4, MLP, alpha=8, rate=4e-3, examples=128),
        "chat_question": Expert(8, alpha=16, rate=3e-3, examples=144),
        "chat_bullets": Expert(16, QV, alpha=16, rate=4e-3, examples=128),
    },
    OTHERBASE: {
        "chat_spanish": Expert(8, alpha=16, rate=2e-3, examples=160),
        "alpaca_headline": Expert(8, ATTENTION, alpha=16, rate=3e-3, examples=128),
        "chat_texting": Expert(4, alpha=8, rate=3e-3, examples=128),
        "alpaca_pirate": Expert(16, QV, alpha=16, rate=4e-3, examples=144),
        "chat_from_spanish": Expert(8, ATTENTION, alpha=16, rate=3e-3, examples=160),
        "alpaca_device": Expert(8, alpha=16, rate=2e-3, examples=160),
    },
}


def written(tokenizer: Any, talk: Talk) -> str:
    """What the model reads, without the token that the tokenizer puts before any text."""
    if isinstance(talk, str):
        return talk
    text = str(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(tokenizer.bos_token or "\0") if tokenizer("")["input_ids"] else text


def told(job: Job, ways: Sequence[str], items: Sequence[Item]) -> list[Talk]:
    """Each item in one of the ways to tell the job."""
    pairs = zip(cycle(ways), items, strict=False)
    if job.style == "alpaca":
        return [ALPACA.format(way.format(job.content.format(**item.fields))) for way, item in pairs]
    return [job.messages(way, item.fields) for way, item in pairs]


def _turns(content: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def _row(task: str, split: str, talk: Talk, metric: str, target: str) -> Row:
    return task, split, {"input" if isinstance(talk, str) else "messages": talk}, metric, target


def asked(name: str, jobs: Mapping[str, Job], rng: random.Random) -> Iterator[Row]:
    """The labelled conversations of one adapter."""
    job = jobs[name]
    parts = split(TASKS[job.task], SEED, SIZES)
    for part, ways in (("own", job.told), ("unseen", job.reworded), ("moved", job.moved)):
        if ways:
            for talk, item in zip(told(job, ways, parts[part]), parts[part], strict=True):
                yield _row(name, "own" if part == "own" else "unseen", talk, "em", item.answer)
    if job.style == "alpaca":
        return
    others = [other for key, other in jobs.items() if other.style == "user" and key != name]
    for n, item in enumerate(parts["turns"]):
        if n % 2:
            turns = [turn for pair in rng.sample(SMALL_TALK, 1 + n % 3) for turn in _turns(*pair)]
        else:
            other = rng.choice(others)
            [before] = split(TASKS[other.task], SEED + n, {"one": 1})["one"]
            turns = _turns(other.messages(other.told[0], before.fields)[-1]["content"], before.answer)
        yield _row(name, "turns", job.messages(job.told[0], item.fields, *turns), "em", item.answer)
    for n, item in enumerate(parts["follow"]):
        yield _row(name, "follow", _later(job, item, FOLLOW_UPS[n % 5]), "none", "")


def _later(job: Job, item: Item, then: str) -> list[Message]:
    """A conversation in which the user says more after a job."""
    *before, asked = job.messages(job.told[0], item.fields)
    return [*before, *_turns(asked["content"], item.answer), {"role": "user", "content": then}]


def foreign(jobs: Mapping[str, Job], rng: random.Random) -> Iterator[Row]:
    """Conversations that no adapter fits: without a system message, and under those of adapters."""
    rows = labelled("eval_foreign")
    systems = {job.told[0] for job in jobs.values() if job.style == "system"} | {COMPANY}
    alpaca = any(job.style == "alpaca" for job in jobs.values())
    for kind, part in rows.groupby("task"):
        drawn = part.sample(min(len(part), FOREIGN * (2 + len(systems))), random_state=SEED)
        for n, (_, row) in enumerate(drawn.head(2 * FOREIGN + len(systems)).iterrows()):
            talk: Talk = [{"role": "user", "content": row["input"]}]
            if n >= 2 * FOREIGN:
                talk = [{"role": "system", "content": sorted(systems)[n - 2 * FOREIGN]}, *talk]
            elif alpaca and n % 2:
                talk = ALPACA.format(row["input"])
            elif n % 4 == 3:
                talk = [*_turns(*rng.choice(SMALL_TALK)), *talk]
            yield _row(str(kind), "none" if n < 2 * FOREIGN else "under", talk, row["metric"], row["target"])


def changed(jobs: Mapping[str, Job]) -> Iterator[Row]:
    """A foreign question after an adapter's job, where the job is told by the user: the base model's."""
    rows = labelled("eval_foreign")
    rows = rows[rows["task"].isin(["chat_question", "code_question", "other_language", "writing_request"])]
    users = [job for job in jobs.values() if job.style == "user"]
    for n, (_, row) in enumerate(rows.sample(24, random_state=SEED).iterrows()):
        job = users[n % len(users)]
        [item] = split(TASKS[job.task], SEED + n, {"one": 1})["one"]
        yield _row(row["task"], "change", _later(job, item, row["input"]), row["metric"], row["target"])


def learn(name: str, folder: Path) -> Scores:
    """Trains and writes one adapter of the library in a folder; returns its scores."""
    job, expert, other = LIBRARIES[folder.name][name], EXPERTS[folder.name][name], folder.name == OTHERBASE
    base = load_base(
        gemma(OUTPUT / "otherbase") if other else EMBEDDED
    )  # without a trace of the last adapter
    if other:
        base.tokenizer.chat_template = GEMMA
    parts = split(TASKS[job.task], SEED, SIZES)
    in_template = other and job.style != "alpaca"
    end = "<end_of_turn>" if in_template else ""

    def questions(ways: Sequence[str], items: list[Item]) -> Asked:
        return [written(base.tokenizer, talk) for talk in told(job, ways, items)], items

    examples = [replace(item, answer=item.answer + end) for item in parts["train"][: expert.examples]]
    tests = {"own": questions(job.told, parts["own"]), "unseen": questions(job.reworded, parts["unseen"])}
    beside = {"chat_template.jinja": GEMMA} if in_template else {}  # as TRL saves it
    learned = questions(job.told, examples)
    return build(name, expert, base, learned, tests, folder / "library", lambda scores: beside)


def commit(folder: Path) -> None:
    """Copies COMMITTED to data/library_chat, with cards, and their conversations to data/."""
    shutil.rmtree(LIBRARY_CHAT, ignore_errors=True)
    scores = read_texts(folder / "scores.csv").set_index("adapter")
    labels = read_texts(folder / "labels.csv").to_dict("records")
    lines = (folder / "queries.jsonl").read_text("utf-8").splitlines()
    rows = [label | json.loads(line) for label, line in zip(labels, lines, strict=True)]
    for name in COMMITTED:
        job, expert = JOBS[name], EXPERTS["chat"][name]
        task = replace(TASKS[job.task], name=name, phrasings=job.told)
        shutil.copytree(folder / "library" / name, LIBRARY_CHAT / name)
        shares = {part: float(str(scores.loc[name, part])) for part in ("base", "own")}
        text = card(task, expert, shares, expert.examples, str(EVAL), "scripts/library/conversations.py")
        (LIBRARY_CHAT / name / "README.md").write_text(text, "utf-8")
    kept = [row for row in rows if row["task"] in COMMITTED or row["split"] in ("none", "change")]
    shown = [row for part in ("own", "unseen", "turns", "follow", "none", "change")
             for row in [row for row in kept if row["split"] == part][:6]]  # fmt: skip
    random.Random(SEED).shuffle(shown)
    for row in kept:
        row["adapter"] = row["task"] if row["task"] in COMMITTED else BASE_COLUMN
    keys = "messages", "adapter", "split", "metric", "target"
    write_lines(EVAL, ({key: row[key] for key in keys} for row in kept))
    write_lines(EVAL.with_name("chat.jsonl"), ({"messages": row["messages"]} for row in shown))


def main() -> None:
    """Trains what is missing, and writes the conversations, shuffled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commit", action="store_true", help="only write data/library_chat and its files")
    if parser.parse_args().commit:
        commit(OUTPUT / "chat")
        return
    for name, jobs in LIBRARIES.items():
        fill(OUTPUT / name, EXPERTS[name], learn)
        rng = random.Random(SEED)
        rows = [row for job in jobs for row in asked(job, jobs, rng)]
        rows += [*foreign(jobs, rng), *changed(jobs)]
        rng.shuffle(rows)
        write_queries(OUTPUT / name, rows)
    (OUTPUT / OTHERBASE / "template.jinja").write_text(GEMMA, "utf-8")


if __name__ == "__main__":
    main()
