"""Reasoning: relations, syllogisms, look-ups and orderings, all drawn from reasoning-gym."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from . import GYM, Item, Task, from_reasoning_gym


def _family(rng: random.Random) -> Iterator[Item]:
    for entry in from_reasoning_gym(
        "family_relationships", seed=rng.getrandbits(30), min_family_size=4, max_family_size=6
    ):
        meta: Any = entry["metadata"]
        story = str(entry["question"]).split("\n\n")[0]
        yield Item({"story": story, "a": meta["person1"], "b": meta["person2"]}, str(entry["answer"]))


def _syllogism(rng: random.Random) -> Iterator[Item]:
    for entry in from_reasoning_gym("syllogism", seed=rng.getrandbits(30)):
        meta: Any = entry["metadata"]
        fields = {key: meta[key] for key in ("premise1", "premise2", "conclusion")}
        yield Item(fields, str(entry["answer"]), ("Yes", "No"))


def _needle(rng: random.Random) -> Iterator[Item]:
    for entry in from_reasoning_gym(
        "needle_haystack", seed=rng.getrandbits(30), min_num_statements=4, max_num_statements=6
    ):
        facts, question = str(entry["question"]).rsplit("\n", 1)
        question = question.removesuffix(" Reply only with a name.")
        yield Item({"facts": facts.strip(), "question": question}, str(entry["answer"]))


def _word_reversal(rng: random.Random) -> Iterator[Item]:
    for entry in from_reasoning_gym(
        "word_sequence_reversal", seed=rng.getrandbits(30), min_words=3, max_words=6
    ):
        words = str(entry["question"]).strip().rsplit(": ", 1)[1]
        yield Item({"words": words}, str(entry["answer"]))


TASKS = (
    Task(
        "family_relation",
        "reasoning",
        "Names the relation of two persons in a family story.",
        **GYM,
        items=_family,
        phrasings=(
            "{story}\n\nHow is {a} related to {b}? Provide the relationship in one word.\nAnswer:",
            "Family: {story}\nQuestion: what relation is {a} to {b}?\nRelation:",
        ),
        unseen=(
            "Read about this family and fill the gap with one word. {story}\n{a} is the ___ of {b}. The missing word is:",
            "My genealogy notes say: {story} So to {b}, {a} is the",
        ),
    ),
    Task(
        "syllogism",
        "reasoning",
        "Says whether a conclusion follows from two premises.",
        **GYM,
        items=_syllogism,
        has_adapter=False,  # trained as an expert it gained less than 15 points over the base model
        phrasings=(),
        unseen=(
            "Consider these statements:\n1. {premise1}\n2. {premise2}\n\nDoes it logically follow that:\n{conclusion}?\n(Answer Yes or No)\nAnswer:",
            'Suppose we know that "{premise1}" and that "{premise2}". Is the conclusion "{conclusion}" valid?',
            "Premises: {premise1}; {premise2}.\nClaim: {conclusion}.\nDo the premises entail the claim, yes or no?",
        ),
    ),
    Task(
        "needle",
        "reasoning",
        "Finds the one person in a list of statements to whom a fact applies.",
        **GYM,
        items=_needle,
        phrasings=("{facts}\n{question} Reply only with a name.\nName:",),
        unseen=(
            "Below are notes about several people.\n---\n{facts}\n---\nUsing the notes, tell me: {question}\nThe person is",
            "Q: {question}\nContext: {facts}\nA (first name only):",
        ),
    ),
    Task(
        "word_reversal",
        "reasoning",
        "Writes a list of words in reverse order.",
        **GYM,
        items=_word_reversal,
        phrasings=(
            "Reverse this list of words: {words}\nReversed:",
            "Write the words from last to first, separated by commas: {words}\nAnswer:",
        ),
        unseen=(
            "Here is a list: {words}. Give me the same list backwards (last item first).\nOutput:",
            "words = {words}\nlist(reversed(words)) is",
        ),
    ),
)
