"""The tasks of the committed library: what each adapter was trained for, and how it is tested.

A task yields labelled items without end (or until its source is used up) and knows how to ask
for an item in words. Everything is drawn from one seed, so training, evaluation and test items
can be kept apart by construction: they are consecutive parts of one stream without repeats.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

GYM = "reasoning-gym"


@dataclass(frozen=True)
class Item:
    """One labelled question, before it is put into words.

    Attributes:
        fields: what the phrasing's placeholders are filled with.
        answer: the expected text; for multiple choice one of `choices`.
        choices: the options of a multiple-choice item, None for generation.
    """

    fields: dict[str, str]
    answer: str
    choices: tuple[str, ...] | None = None

    @property
    def target(self) -> str:
        """What a prediction must be: the answer; for multiple choice its 0-based index, as in the kit."""
        return self.answer if self.choices is None else str(self.choices.index(self.answer))


Stream = Callable[[random.Random], Iterator[Item]]


@dataclass(frozen=True)
class Task:
    """A named source of items.

    Attributes:
        name: also the name of its adapter, where it has one.
        skill: reasoning, maths, coding, chat or tool use.
        summary: one sentence for the model card.
        items: a seeded stream of items.
        unseen: templates never used in training, written by hand for data/eval_unseen.
        phrasings: templates used in training and in data/eval; none for tasks without an adapter.
        source: where the items come from; all sources are under Apache-2.0.
    """

    name: str
    skill: str
    summary: str
    items: Stream = field(repr=False)
    unseen: tuple[str, ...] = field(repr=False)
    phrasings: tuple[str, ...] = field(default=(), repr=False)
    source: str = "a seeded generator of this repository"


def split(task: Task, seed: int, sizes: dict[str, int]) -> dict[str, list[Item]]:
    """Draws disjoint parts of a task's stream, in the order of `sizes`.

    Items are told apart by their fields. A source that runs dry leaves the last part short.
    """
    rng = random.Random(f"{seed}:{task.name}")
    seen: set[tuple[str, ...]] = set()

    def fresh() -> Iterator[Item]:
        repeats = 0
        for item in task.items(rng):
            key = tuple(item.fields.values())
            repeats = repeats + 1 if key in seen else 0
            if repeats > 1000:  # the stream has nothing new to offer
                return
            if not repeats:
                seen.add(key)
                yield item

    stream = fresh()
    return {part: list(itertools.islice(stream, size)) for part, size in sizes.items()}


def reworded(task: Task, items: list[Item]) -> list[str]:
    """Every item in a phrasing never used in training; these take turns."""
    forms = itertools.cycle(task.unseen)
    return [form.format(**item.fields) for form, item in zip(forms, items, strict=False)]


def all_tasks() -> dict[str, Task]:
    """All tasks of the committed library by name, and those that it has no adapter for."""
    from . import chat, coding, maths, reasoning, tools, unserved

    modules = (reasoning, maths, coding, chat, tools, unserved)
    return {task.name: task for module in modules for task in module.TASKS}


def drawn(draw: Callable[[random.Random], Item]) -> Stream:
    """An endless stream of items that are drawn one by one."""
    return lambda rng: (draw(rng) for _ in itertools.count())


def gym(name: str, item: Callable[[str, dict[str, Any], str], Item], **config: int) -> Stream:
    """An endless stream of one reasoning-gym generator's items, made of question, metadata and answer."""

    def items(rng: random.Random) -> Iterator[Item]:
        import reasoning_gym

        # Entry i of a data set is drawn from seed + i: chunks must not overlap.
        size, seed = 500, rng.getrandbits(30)
        for start in itertools.count(seed, size):
            for entry in reasoning_gym.create_dataset(name, size=size, seed=start, **config):
                yield item(str(entry["question"]), entry["metadata"], str(entry["answer"]))

    return items
