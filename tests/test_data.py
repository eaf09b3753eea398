"""The committed queries are those that the tasks make: a word that is changed there changes data/, too."""

import json
import random

import pytest

from helpers import ROOT, read_table
from scripts.library import conversations
from scripts.library.tasks import Task, all_tasks, reworded, split
from scripts.library.tasks.conversations import JOBS
from scripts.library.train import SEED, SIZES, phrase

OWN = [task for task in all_tasks().values() if task.source == Task.source]  # others need a package


@pytest.mark.parametrize("task", OWN, ids=lambda task: task.name)
def test_labelled_queries_are_those_of_their_task(task):
    sizes = {part: SIZES[part] for part in (("unseen", "eval") if task.phrasings else ("unseen",))}
    parts = split(task, SEED, sizes)
    asked = {"eval_unseen": reworded(task, parts["unseen"])}
    made = {"eval_unseen": parts["unseen"]}
    if task.phrasings:
        asked["eval"], made["eval"] = phrase(task, parts["eval"])
    for folder, prompts in asked.items():
        rows = read_table(ROOT / "data" / folder / f"{task.name}.csv")
        assert [row["input"] for row in rows] == prompts
        assert [row["target"] for row in rows] == [item.target for item in made[folder]]


def test_labelled_conversations_are_those_of_their_job(monkeypatch):
    monkeypatch.chdir(ROOT)
    rng = random.Random(SEED)
    rows = [row for name in JOBS for row in conversations.asked(name, JOBS, rng)]
    made = [json.dumps(asked["messages"]) for name, _, asked, *_ in rows if name in conversations.COMMITTED]
    lines = map(json.loads, (ROOT / "data/eval_chat.jsonl").read_text("utf-8").splitlines())
    kept = [json.dumps(line["messages"]) for line in lines if line["adapter"] != "base"]
    assert made and sorted(made) == sorted(kept)
