"""Reasoning: relations, syllogisms, look-ups and orderings, all drawn from reasoning-gym."""

from typing import Any

from . import GYM, Item, Task, gym


def _family(question: str, meta: dict[str, Any], answer: str) -> Item:
    return Item({"story": question.split("\n\n")[0], "a": meta["person1"], "b": meta["person2"]}, answer)


def _syllogism(question: str, meta: dict[str, Any], answer: str) -> Item:
    return Item({key: meta[key] for key in ("premise1", "premise2", "conclusion")}, answer, ("Yes", "No"))


def _needle(question: str, meta: dict[str, Any], answer: str) -> Item:
    facts, asked = question.rsplit("\n", 1)
    return Item({"facts": facts.strip(), "question": asked.removesuffix(" Reply only with a name.")}, answer)


def _word_reversal(question: str, meta: dict[str, Any], answer: str) -> Item:
    return Item({"words": question.strip().rsplit(": ", 1)[1]}, answer)


TASKS = (
    Task("family_relation", "reasoning", "Names the relation of two persons in a family story.",
         gym("family_relationships", _family, min_family_size=4, max_family_size=6), source=GYM,
         phrasings=("{story}\n\nHow is {a} related to {b}? Provide the relationship in one word.\nAnswer:",
                    "Family: {story}\nQuestion: what relation is {a} to {b}?\nRelation:"),
         unseen=("Read about this family and fill the gap with one word. {story}\n{a} is the ___ of {b}. The missing word is:",
                 "My genealogy notes say: {story} So to {b}, {a} is the")),
    # No adapter: trained as an expert it gained less than 15 points over the base model.
    Task("syllogism", "reasoning", "Says whether a conclusion follows from two premises.", gym("syllogism", _syllogism), source=GYM,
         unseen=("Consider these statements:\n1. {premise1}\n2. {premise2}\n\nDoes it logically follow that:\n{conclusion}?\n(Answer Yes or No)\nAnswer:",
                 'Suppose we know that "{premise1}" and that "{premise2}". Is the conclusion "{conclusion}" valid?',
                 "Premises: {premise1}; {premise2}.\nClaim: {conclusion}.\nDo the premises entail the claim, yes or no?")),
    Task("needle", "reasoning", "Finds the one person in a list of statements to whom a fact applies.",
         gym("needle_haystack", _needle, min_num_statements=4, max_num_statements=6), source=GYM,
         phrasings=("{facts}\n{question} Reply only with a name.\nName:",),
         unseen=("Below are notes about several people.\n---\n{facts}\n---\nUsing the notes, tell me: {question}\nThe person is",
                 "Q: {question}\nContext: {facts}\nA (first name only):")),
    Task("word_reversal", "reasoning", "Writes a list of words in reverse order.",
         gym("word_sequence_reversal", _word_reversal, min_words=3, max_words=6), source=GYM,
         phrasings=("Reverse this list of words: {words}\nReversed:",
                    "Write the words from last to first, separated by commas: {words}\nAnswer:"),
         unseen=("Here is a list: {words}. Give me the same list backwards (last item first).\nOutput:",
                 "words = {words}\nlist(reversed(words)) is")),
)  # fmt: skip
