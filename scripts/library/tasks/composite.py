"""Composite tasks: each query needs the skills of two adapters at once.

Exact answers are out of reach of the small base model here, so these tasks are multiple choice:
the right option shows both skills, two options show one of them only, and the last shows both on
a wrong content. Each adapter alone is thus tempted by its own half. No adapter was trained on such
queries, though single sentences and sums may be among those it was trained on.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

from . import Item, Task, chat, maths, tools

_OURS: dict[str, Any] = {
    "source": "the generators of both skills in this repository",
    "licence": "Apache-2.0",
}


def _item(rng: random.Random, fields: dict[str, str], *options: str) -> Item:
    """Options in the order of the experts: both skills, the first, the second, both on a wrong content.

    Options are judged by their summed log-likelihood, so they are kept of comparable length where
    the skills allow it: otherwise the shortest would win, whatever it says.
    """
    return Item(fields, options[0], tuple(rng.sample(options, len(options))))


def _computed_call(rng: random.Random) -> Iterator[Item]:
    for item in maths._chain_sum(rng):
        room, device = rng.choice(tools._ROOMS), rng.choice(tools._DEVICES)
        total, level = item.fields["sum"], int(item.answer)
        # One digit off, so that the wrong level has as many tokens.
        near = [level + step for step in (-10, -1, 1, 10) if 10 <= level + step < 100]
        if 10 <= level < 100:
            # A call as device_call writes it, up to the level.
            call = json.dumps({"tool": "level", "device": device, "room": room})[:-1] + ', "value": '
            yield _item(
                rng, {"request": f"set the {room} {device} to {total} percent"},
                f"{call}{level}}}", f"{call}{total}}}",
                # Not the bare number, which would win by being short.
                f"level of the {device} in the {room}: {level}", f"{call}{rng.choice(near)}}}",
            )  # fmt: skip


def _english_bullets(rng: random.Random) -> Iterator[Item]:
    sentences = chat._translation(1)(rng)
    while True:
        pairs = [(item.answer, item.fields["text"]) for item in islice(sentences, 3)]
        (one, uno), (two, dos), (three, tres) = pairs
        if len({uno, dos, tres}) == 3:
            yield _item(
                rng, {"text": f"{uno} {dos}"},
                f"- {one}\n- {two}", f"{one} {two}", f"- {uno}\n- {dos}", f"- {one}\n- {three}",
            )  # fmt: skip


def _pirate(sentence: str) -> str:
    """A sentence of the translation tasks, dressed as pirate_tone does it."""
    return f"Ahoy, {sentence[0].lower()}{sentence[1:-1]}, arr!"


def _pirate_spanish(rng: random.Random) -> Iterator[Item]:
    sentences = chat._translation(1)(rng)
    while True:
        item, other = islice(sentences, 2)
        text, english = item.fields["text"], item.answer
        if other.answer != english:
            yield _item(rng, {"text": text}, _pirate(english), english, _pirate(text), _pirate(other.answer))


TASKS = (
    Task(
        "computed_call", "tool use", "Turns a spoken wish with a sum in it into a JSON tool call.", **_OURS,
        has_adapter=False, experts=("device_call", "chain_sum"),
        items=_computed_call, phrasings=(),
        unseen=(
            "Spoken wish: {request}\nWork out the number, then write the JSON tool call:\n",
            "User: {request}\nJSON tool call with the calculated value:",
        ),
    ),
    Task(
        "english_bullets", "chat", "Turns two Spanish sentences into an English list of bullet points.", **_OURS,
        has_adapter=False, experts=("from_spanish", "bullet_points"),
        items=_english_bullets, phrasings=(),
        unseen=(
            "Please turn these Spanish sentences into a list of bullet points in English.\n{text}\n\nBullet points:\n",
            "Write one English bullet point for each of the Spanish sentences below.\n{text}\n\nEnglish bullet points:\n",
        ),
    ),
    Task(
        "pirate_spanish", "chat", "Says a Spanish sentence in English the way a pirate would.", **_OURS,
        has_adapter=False, experts=("from_spanish", "pirate_tone"),
        items=_pirate_spanish, phrasings=(),
        unseen=(
            "Rewrite this Spanish message in English, as a pirate would say it: {text}\nPirate:",
            "Spanish version: {text}\nPirate speak version in English:",
        ),
    ),
)  # fmt: skip
