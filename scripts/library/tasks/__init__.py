"""The tasks of the committed library: what each adapter was trained for, and how it is tested.

A task yields labelled items without end (or until its source is used up) and knows how to ask
for an item in words. Everything is drawn from one seed, so training, evaluation and test items
can be kept apart by construction: they are consecutive parts of one stream without repeats.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

# Where items come from, for tasks of several files.
OURS: dict[str, Any] = {"source": "a seeded generator of this repository", "licence": "Apache-2.0"}
GYM: dict[str, Any] = {"source": "reasoning-gym", "licence": "Apache-2.0"}


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
        source: where the items come from.
        licence: the licence of that source (SPDX).
        items: a seeded stream of items.
        phrasings: templates used in training and in data/eval.
        unseen: templates never used in training, written by hand for data/eval_unseen.
        has_adapter: False for tasks that no adapter of the library was trained for.
        experts: adapters whose skills a composite task needs, both.
    """

    name: str
    skill: str
    summary: str
    source: str
    licence: str
    items: Stream = field(repr=False)
    phrasings: tuple[str, ...] = field(repr=False)
    unseen: tuple[str, ...] = field(repr=False)
    has_adapter: bool = True
    experts: tuple[str, ...] = ()


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
    return {part: list(islice(stream, size)) for part, size in sizes.items()}


def all_tasks() -> dict[str, Task]:
    """All tasks by name, those with an adapter first."""
    from . import chat, coding, maths, reasoning, tools, unserved

    modules = (reasoning, maths, coding, chat, tools, unserved)
    return {task.name: task for module in modules for task in module.TASKS}


def composite_tasks() -> dict[str, Task]:
    """The composite tasks by name; kept apart from all_tasks, as no single adapter serves them."""
    from . import composite

    return {task.name: task for task in composite.TASKS}


def from_reasoning_gym(name: str, **config: object) -> Iterator[dict[str, object]]:
    """An endless stream of one reasoning-gym generator's items (`config` must hold a seed)."""
    import reasoning_gym

    # Entry i of a data set is drawn from seed + i: chunks must not overlap.
    size, seed = 500, int(str(config.pop("seed")))
    for chunk in range(10**6):
        yield from reasoning_gym.create_dataset(name, size=size, seed=seed + chunk * size, **config)
