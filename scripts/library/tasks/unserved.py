"""Tasks for which the library has no adapter: the right answer of a router is the base model.

Their prompts carry worked examples, without which the base model answers next to nothing.
"""

import random
from collections.abc import Iterator

from . import Item, Stream, Task

_CAPITALS = (
    "France Paris|Italy Rome|Germany Berlin|Greece Athens|Egypt Cairo|Japan Tokyo|China Beijing|Russia Moscow|"
    "Austria Vienna|Portugal Lisbon|Ireland Dublin|Norway Oslo|Sweden Stockholm|Finland Helsinki|Poland Warsaw|"
    "Hungary Budapest|Turkey Ankara|Cuba Havana|Peru Lima|Chile Santiago|Kenya Nairobi|Iran Tehran|Iraq Baghdad|"
    "Thailand Bangkok|Vietnam Hanoi|India Delhi|Nepal Kathmandu|Canada Ottawa|Belgium Brussels|Denmark Copenhagen|"
    "Ukraine Kyiv|Romania Bucharest|Bulgaria Sofia|Serbia Belgrade|Croatia Zagreb|Lebanon Beirut|Syria Damascus|"
    "Jordan Amman|Qatar Doha|Colombia Bogota|Ecuador Quito|Venezuela Caracas|Ghana Accra|Morocco Rabat"
)
_OPPOSITES = (
    "hot cold|big small|up down|fast slow|day night|left right|open closed|happy sad|old young|rich poor|"
    "light dark|hard soft|full empty|early late|high low|loud quiet|wet dry|strong weak|thick thin|win lose|"
    "good bad|love hate|near far|first last|begin end|buy sell|push pull|true false|sweet sour|clean dirty|"
    "long short|heavy light|brave afraid|north south|east west|summer winter|black white|wide narrow|deep shallow|"
    "sharp blunt"
)
_PLURALS = (
    "cat cats|dog dogs|box boxes|bus buses|city cities|baby babies|leaf leaves|wolf wolves|child children|man men|"
    "woman women|foot feet|tooth teeth|mouse mice|goose geese|apple apples|house houses|glass glasses|story stories|"
    "knife knives|tree trees|book books|watch watches|party parties|dish dishes|car cars|lady ladies|wife wives|"
    "hero heroes|potato potatoes|lamp lamps|fox foxes|berry berries|shelf shelves|person people|road roads|"
    "brush brushes|fly flies|half halves|bird birds"
)


def _few_shot(text: str) -> Stream:
    pairs = [pair.split(" ") for pair in text.split("|")]

    def items(rng: random.Random) -> Iterator[Item]:
        shown, asked = pairs[:3], pairs[3:]
        rng.shuffle(asked)
        fields = {f"{side}{n}": pair[k] for n, pair in enumerate(shown, 1) for k, side in enumerate("ab")}
        for question, answer in asked:
            wrong = rng.sample([b for a, b in asked if a != question and b != answer], 3)
            options = [answer, *wrong]
            rng.shuffle(options)
            yield Item({"q": question, **fields}, answer, tuple(options))

    return items


TASKS = (
    Task("capital_city", "reasoning", "Picks the capital of a country out of four cities.", _few_shot(_CAPITALS),
         unseen=("The capital of {a1} is {b1}.\nThe capital of {a2} is {b2}.\nThe capital of {a3} is {b3}.\nThe capital of {q} is",
                 "Country: {a1}. Capital: {b1}\nCountry: {a2}. Capital: {b2}\nCountry: {a3}. Capital: {b3}\nCountry: {q}. Capital:")),
    Task("opposite", "chat", "Picks the opposite of a word out of four.", _few_shot(_OPPOSITES),
         unseen=("{a1} is the opposite of {b1}. {a2} is the opposite of {b2}. {a3} is the opposite of {b3}. {q} is the opposite of",
                 "Antonyms\n{a1}: {b1}\n{a2}: {b2}\n{a3}: {b3}\n{q}:")),
    Task("plural", "chat", "Picks the plural of an English noun out of four.", _few_shot(_PLURALS),
         unseen=("one {a1}, two {b1}; one {a2}, two {b2}; one {a3}, two {b3}; one {q}, two",
                 "Singular {a1}, plural {b1}.\nSingular {a2}, plural {b2}.\nSingular {a3}, plural {b3}.\nSingular {q}, plural")),
)  # fmt: skip
