"""Trains two development libraries of conversations: `python -m scripts.library.conversations [LIBRARY ...]`.

- chat: nine adapters of the embedded base model, by chat SFT in its own template.
- chat_otherbase: three such adapters of Gemma 3 270M in Gemma's template, which knows no system message, and
  three in an Alpaca frame.

Each is a folder of output/development with the adapters in library/, the conversations in queries.jsonl, and
what is known of them in labels.csv and scores.csv. Resumable and seeded like scripts/library/development.py.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from router.constants import BASE_COLUMN
from router.model.base import EMBEDDED, Base, load_base
from router.queries.submission import write_table
from scripts.bench.score import labelled, read_texts
from scripts.library.development import LABELS, command, gemma, note
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
from scripts.library.train import ATTENTION, MLP, QV, SEED, Asked, Expert, Scores, build, card, missing

TASKS: Mapping[str, Task] = all_tasks() | {task.name: task for task in families.TASKS}
LIBRARY_CHAT, EVAL = Path("data/library_chat"), Path("data/eval_chat.jsonl")
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


@dataclass(frozen=True)
class Plan:
    """One library: the base model, its jobs, how each adapter is trained, and the template if it has none."""

    jobs: Mapping[str, Job]
    experts: Mapping[str, Expert]
    template: str | None = None


PLANS = {
    "chat": Plan(
        JOBS,
        {
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
    ),
    "chat_otherbase": Plan(
        OTHER,
        {
            "chat_spanish": Expert(8, alpha=16, rate=2e-3, examples=160),
            "alpaca_headline": Expert(8, ATTENTION, alpha=16, rate=3e-3, examples=128),
            "chat_texting": Expert(4, alpha=8, rate=3e-3, examples=128),
            "alpaca_pirate": Expert(16, QV, alpha=16, rate=4e-3, examples=144),
            "chat_from_spanish": Expert(8, ATTENTION, alpha=16, rate=3e-3, examples=160),
            "alpaca_device": Expert(8, alpha=16, rate=2e-3, examples=160),
        },
        GEMMA,
    ),
}  # fmt: skip


def base_of(plan: Plan, folder: Path) -> Base:
    """A fresh base model, without a trace of the last adapter, with the library's template."""
    base = load_base(gemma(folder.parent / "otherbase") if plan.template else EMBEDDED)
    if plan.template:
        base.tokenizer.chat_template = plan.template
    return base


def written(tokenizer: Any, messages: Sequence[Message]) -> str:
    """A conversation as the model reads it, without the token that the tokenizer puts before any text."""
    if messages[0]["role"] == "alpaca":
        return ALPACA.format(messages[0]["content"])
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return text.removeprefix(tokenizer.bos_token or "\0") if tokenizer("")["input_ids"] else text


def told(job: Job, ways: Sequence[str], items: Sequence[Item], *between: Message) -> list[list[Message]]:
    """Each item in one of the ways to tell the job."""
    if job.style == "alpaca":
        contents = (ways[n % len(ways)].format(job.content.format(**i.fields)) for n, i in enumerate(items))
        return [[{"role": "alpaca", "content": content}] for content in contents]
    return [job.messages(ways[n % len(ways)], item.fields, *between) for n, item in enumerate(items)]


def _turns(content: str, answer: str) -> tuple[Message, Message]:
    return {"role": "user", "content": content}, {"role": "assistant", "content": answer}


Row = tuple[str, str, list[Message], str, str]  # task, split, messages, metric, target


def asked(name: str, jobs: Mapping[str, Job], rng: random.Random) -> Iterator[Row]:
    """The labelled conversations of one adapter."""
    job = jobs[name]
    parts = split(TASKS[job.task], SEED, SIZES)
    for part, ways in (("own", job.told), ("unseen", job.reworded), ("moved", job.moved)):
        if ways:
            for messages, item in zip(told(job, ways, parts[part]), parts[part], strict=True):
                yield name, "own" if part == "own" else "unseen", messages, "em", item.answer
    if job.style == "alpaca":
        return
    others = [other for key, other in jobs.items() if other.style == "user" and key != name]
    for n, item in enumerate(parts["turns"]):
        if n % 2:
            turns = [turn for pair in rng.sample(SMALL_TALK, 1 + n % 3) for turn in _turns(*pair)]
        else:
            other = rng.choice(others)
            [before] = split(TASKS[other.task], SEED + n, {"one": 1})["one"]
            [first] = told(other, other.told, [before])
            turns = [*_turns(first[-1]["content"], before.answer)]
        [messages] = told(job, job.told, [item], *turns)
        yield name, "turns", messages, "em", item.answer
    for n, item in enumerate(parts["follow"]):
        [messages] = told(job, job.told, [item])
        more = [{"role": "assistant", "content": item.answer}, {"role": "user", "content": FOLLOW_UPS[n % 5]}]
        yield name, "follow", [*messages, *more], "none", ""


def foreign(jobs: Mapping[str, Job], rng: random.Random) -> Iterator[Row]:
    """Conversations that no adapter fits: without a system message, and under those of adapters."""
    rows = labelled("eval_foreign")
    systems = {job.told[0] for job in jobs.values() if job.style == "system"} | {COMPANY}
    alpaca = any(job.style == "alpaca" for job in jobs.values())
    for kind, part in rows.groupby("task"):
        drawn = part.sample(min(len(part), FOREIGN * (2 + len(systems))), random_state=SEED)
        for n, (_, row) in enumerate(drawn.iterrows()):
            message = {"role": "user", "content": row["input"]}
            if n < 2 * FOREIGN:
                if alpaca and n % 2:
                    yield str(kind), "none", [message | {"role": "alpaca"}], row["metric"], row["target"]
                    continue
                talk = _turns(*rng.choice(SMALL_TALK)) if n % 4 == 3 else ()
                yield str(kind), "none", [*talk, message], row["metric"], row["target"]
            elif n < 2 * FOREIGN + len(systems):
                head = {"role": "system", "content": sorted(systems)[n - 2 * FOREIGN]}
                yield str(kind), "under", [head, message], row["metric"], row["target"]


def changed(jobs: Mapping[str, Job]) -> Iterator[Row]:
    """A foreign question after an adapter's job, where the job is told by the user: the base model's."""
    rows = labelled("eval_foreign")
    rows = rows[rows["task"].isin(["chat_question", "code_question", "other_language", "writing_request"])]
    users = [job for job in jobs.values() if job.style == "user"]
    for n, (_, row) in enumerate(rows.sample(24, random_state=SEED).iterrows()):
        job = users[n % len(users)]
        [item] = split(TASKS[job.task], SEED + n, {"one": 1})["one"]
        [messages] = told(job, job.told, [item])
        more = [{"role": "assistant", "content": item.answer}, {"role": "user", "content": row["input"]}]
        yield str(row["task"]), "change", [*messages, *more], row["metric"], row["target"]


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Writes JSON lines, numbered."""
    texts = (json.dumps({"id": str(n), **line}, ensure_ascii=False) for n, line in enumerate(lines))
    path.write_text("".join(f"{text}\n" for text in texts), "utf-8")


def write_queries(folder: Path, jobs: Mapping[str, Job]) -> None:
    """Writes the conversations, shuffled, and their labels apart."""
    rng = random.Random(SEED)
    rows = [row for name in jobs for row in asked(name, jobs, rng)]
    rows += [*foreign(jobs, rng), *changed(jobs)]
    rng.shuffle(rows)
    asked_of = [
        {"input": ALPACA.format(messages[0]["content"])}
        if messages[0]["role"] == "alpaca"
        else {"messages": messages}
        for _, _, messages, _, _ in rows
    ]
    write_lines(folder / "queries.jsonl", asked_of)
    labels = [(n, task, part, metric, target) for n, (task, part, _, metric, target) in enumerate(rows)]
    write_table(folder / "labels.csv", LABELS, labels)


def learn(name: str, plan: Plan, folder: Path) -> Scores:
    """Trains and writes one adapter of the library in a folder; returns its scores."""
    base, job, expert = base_of(plan, folder), plan.jobs[name], plan.experts[name]
    parts = split(TASKS[job.task], SEED, SIZES)
    template = plan.template if job.style != "alpaca" else None
    end = "<end_of_turn>" if template else ""

    def questions(ways: Sequence[str], items: list[Item]) -> Asked:
        return [written(base.tokenizer, messages) for messages in told(job, ways, items)], items

    examples = [replace(item, answer=item.answer + end) for item in parts["train"][: expert.examples]]
    own, unseen = ([replace(item, choices=None) for item in parts[part]] for part in ("own", "unseen"))
    tests = {"own": questions(job.told, own), "unseen": questions(job.reworded, unseen)}
    beside = {"chat_template.jinja": template} if template else {}  # as TRL saves it
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
        job, expert = JOBS[name], PLANS["chat"].experts[name]
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
    """Command line."""
    parser = command(__doc__, PLANS)
    parser.add_argument("--commit", action="store_true", help="only write data/library_chat and its files")
    args = parser.parse_args()
    if args.commit:
        commit(args.output / "chat")
        return
    for name in args.libraries or PLANS:
        folder, plan = args.output / name, PLANS[name]
        for job in missing(folder / "library", plan.experts):
            note(folder / "scores.csv", job, learn(job, plan, folder))
        write_queries(folder, plan.jobs)
        if plan.template:
            (folder / "template.jinja").write_text(plan.template, "utf-8")


if __name__ == "__main__":
    main()
