"""Tasks of the development library `families`: several of one skill, many of which read the same input.

Sums, English sentences put otherwise, and tones. Leaving one out leaves useful relatives. They have no
adapter in data/library.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from . import Item, Stream, Task, chat, drawn, maths, tools

# Sums: two of them take the same input and answer in digits or in words.


def _sum(in_words: bool) -> Stream:
    """A two-digit number plus a one-digit one."""

    def draw(rng: random.Random) -> Item:
        a, b = rng.randint(11, 99), rng.randint(2, 9)
        return Item({"sum": f"{a} + {b}"}, maths.in_words(a + b) if in_words else str(a + b))

    return drawn(draw)


def _take_away(rng: random.Random) -> Item:
    """A one-digit number taken from a two-digit one."""
    a, b = rng.randint(11, 99), rng.randint(2, 9)
    return Item({"sum": f"{a} - {b}"}, str(a - b))


def _product(rng: random.Random) -> Item:
    """A number below ten times a small one."""
    a, b = rng.randint(2, 9), rng.randint(2, 40)
    return Item({"sum": f"{a} x {b}"}, str(a * b))


def _money(rng: random.Random) -> Item:
    """An amount in dollars and quarters of a dollar, and a few dollars more."""
    a, b, cents = rng.randint(11, 99), rng.randint(2, 9), rng.choice(("00", "25", "50", "75"))
    return Item({"sum": f"${a}.{cents} + ${b}"}, f"${a + b}.{cents}")


# Sentences put otherwise: all of them take the English sentences of the task to_spanish.

_FRENCH = (
    ("le chat", "le chien", "le professeur", "le médecin", "mon frère", "ma sœur", "la fille", "le garçon",
     "mon ami", "le fermier"),
    ("mange", "achète", "vend", "voit", "veut", "a", "apporte", "cherche"),
    ("la pomme", "le pain", "le poisson", "le lait", "le livre", "la maison", "la clé", "la voiture",
     "la lettre", "le fromage", "le chapeau", "la table"),
    ("aujourd'hui", "demain", "tous les jours", "la nuit", "dans la cuisine", "en ville", "lundi"),
)  # fmt: skip
_GERMAN = (
    ("die Katze", "der Hund", "der Lehrer", "der Arzt", "mein Bruder", "meine Schwester", "das Mädchen",
     "der Junge", "mein Freund", "der Bauer"),
    ("isst", "kauft", "verkauft", "sieht", "will", "hat", "bringt", "sucht"),
    ("den Apfel", "das Brot", "den Fisch", "die Milch", "das Buch", "das Haus", "den Schlüssel", "das Auto",
     "den Brief", "den Käse", "den Hut", "den Tisch"),
    ("heute", "morgen", "jeden Tag", "nachts", "in der Küche", "in der Stadt", "am Montag"),
)  # fmt: skip
_TO_DO = ("eat", "buy", "sell", "see", "want", "have", "bring", "look for")


def _sentence(words: Sequence[str], end: str = ".") -> str:
    text = " ".join(words)
    return text[0].upper() + text[1:] + end


def _sentences(answer: Callable[[list[int]], str]) -> Stream:
    """English sentences; the answer is made from the numbers of their four parts in chat's tables."""
    tables = (chat._NOUNS, chat._VERBS, chat._OBJECTS, chat._TIMES)

    def draw(rng: random.Random) -> Item:
        numbers = [rng.randrange(len(table)) for table in tables]
        english = [table[n][0] for table, n in zip(tables, numbers, strict=True)]
        return Item({"text": _sentence(english)}, answer(numbers))

    return drawn(draw)


def _french(numbers: list[int]) -> str:
    return _sentence([part[n] for part, n in zip(_FRENCH, numbers, strict=True)])


def _german(numbers: list[int]) -> str:
    who, does, what, when = (part[n] for part, n in zip(_GERMAN, numbers, strict=True))
    return _sentence([who, does, when, what])


def _question(numbers: list[int]) -> str:
    who, does, what, when = numbers
    words = (chat._NOUNS[who][0], _TO_DO[does], chat._OBJECTS[what][0], chat._TIMES[when][0])
    return _sentence(["does", *words], "?")


# Tones: all of them take the casual messages of the task formal_tone.

_TEXTING = (
    "yo {who} snd me da {thing} {when} plz k",
    "{who} soz lost da {thing} {when} lol",
    "{who} ty 4 da {thing} {when} ur da best",
    "{who} cant make da {thing} {when} soz",
    "{who} chk da {thing} {when} ok?",
    "{who} da {thing} woz gr8 {when} omg",
)  # as many as chat has messages


def _messages(answer: Callable[[str, int, dict[str, str]], str]) -> Stream:
    """Casual messages; the answer is made from the message, its number and what its gaps hold."""

    def draw(rng: random.Random) -> Item:
        number = rng.randrange(len(chat._MESSAGES))
        filling = {
            "who": rng.choice(chat._WHO), "thing": rng.choice(chat._THING), "when": rng.choice(chat._WHEN)
        }  # fmt: skip
        text = chat._MESSAGES[number][0].format(**filling)
        return Item({"text": text}, answer(text, number, filling))

    return drawn(draw)


def _shout(text: str, number: int, filling: dict[str, str]) -> str:
    return text.rstrip("?!").upper() + "!!!"


def _text(text: str, number: int, filling: dict[str, str]) -> str:
    return _TEXTING[number].format(**filling)


TASKS = (
    Task("add_two", "maths", "Adds two numbers; answers in digits.", _sum(in_words=False),
         phrasings=("What is {sum}?\nNumber:",
                    "Add up: {sum} ="),
         unseen=("Please tell me the sum {sum} in digits.\nSum:",
                 "The scoreboard changes by {sum} points. It now reads")),
    Task("sum_words", "maths", "Adds two numbers; answers in words.", _sum(in_words=True),
         phrasings=("What is {sum}, in words?\nWords:",),
         unseen=("Work out {sum} and spell out the result in English.\nResult:",
                 "Read aloud what a calculator shows after {sum}: \"")),
    Task("take_away", "maths", "Takes one number from another.", drawn(_take_away),
         phrasings=("Subtract: {sum} =",
                    "{sum}\nWhat is left?\nLeft:"),
         unseen=("Compute the difference {sum} and give the number only.\nDifference:",
                 "A jar holds sweets and a child eats some: {sum}. Still in the jar:")),
    Task("product", "maths", "Multiplies two numbers.", drawn(_product),
         phrasings=("Multiply: {sum} =",
                    "What is {sum}?\nProduct:"),
         unseen=("Find the product of this multiplication: {sum}\nIt is",
                 "Rows times seats in our theatre: {sum}. Seats altogether:")),
    Task("money_sum", "maths", "Adds two sums of money.", drawn(_money),
         phrasings=("Total price of {sum}:",
                    "Bill: {sum}\nTo pay:"),
         unseen=("How much money do I need for {sum}?\nAmount:",
                 "Two things lie on the counter, {sum}. The cashier asks for")),
    Task("spanish", "chat", "Translates simple English sentences into Spanish.", chat._translation(0),
         phrasings=("{text}\nIn Spanish:",
                    "Say it in Spanish: {text}\n"),
         unseen=("Give me the Spanish translation of this sentence. {text}\nTranslation:",
                 "A reader in Mexico City needs a version of \"{text}\" It goes:")),
    Task("french", "chat", "Translates simple English sentences into French.", _sentences(_french),
         phrasings=("{text}\nIn French:",),
         unseen=("Give me the French translation of this sentence. {text}\nTranslation:",
                 "A reader in Paris needs a version of \"{text}\" It goes:")),
    Task("german", "chat", "Translates simple English sentences into German.", _sentences(_german),
         phrasings=("{text}\nIn German:",
                    "English: {text}\nGerman:"),
         unseen=("Give me the German translation of this sentence. {text}\nTranslation:",
                 "A reader in Berlin needs a version of \"{text}\" It goes:")),
    Task("question", "chat", "Turns a statement into a question.", _sentences(_question),
         phrasings=("{text}\nAs a question:",),
         unseen=("Change this statement into a yes-or-no question. {text}\nQuestion:",
                 "I am not sure whether this is so, and would like to ask: {text}\nI ask:")),
    Task("formal", "chat", "Puts a casual message formally.", chat._tone(1),
         phrasings=("Message: {text}\nFormally:",
                    "Say this politely: {text}\n"),
         unseen=("Please reword this note in a formal style. {text}\nFormal style:",
                 "My grandmother only reads proper letters. How do I write to her: {text}\nLetter:")),
    Task("pirate", "chat", "Says a casual message as a pirate.", chat._tone(2),
         phrasings=("Message: {text}\nAs a pirate:",),
         unseen=("Please reword this note in the style of a pirate. {text}\nPirate style:",
                 "On a ship under a black flag the captain bellows: {text}\nOnly he bellows it like this:")),
    Task("shouting", "chat", "Shouts a casual message.", _messages(_shout),
         phrasings=("Message: {text}\nShouted:",
                    "Say this very loudly: {text}\n"),
         unseen=("Please reword this note so that it is shouted. {text}\nShouting:",
                 "He can't hear me over the engine! {text}\nAGAIN, LOUDER:")),
    Task("texting", "chat", "Shortens a casual message to a text message.", _messages(_text),
         phrasings=("Message: {text}\nAs a text:",),
         unseen=("Please reword this note in text message slang. {text}\nSlang:",
                 "A teenager types it on his phone with one thumb: {text}\nHe sends:")),
    Task("units", "maths", "Converts an amount from a larger into a smaller unit.", drawn(maths._units),
         phrasings=("{amount} {large} in {small}:",
                    "Convert {amount} {large} to {small}.\n"),
         unseen=("Express {amount} {large} in {small}, number and unit.\nExpressed:",
                 "The form has a field for {small} only, but I know it is {amount} {large}. I fill in")),
    Task("device", "tool use", "Turns a spoken wish for a smart home into a JSON tool call.", drawn(tools._device),
         phrasings=("Wish: {request}\nJSON:",),
         unseen=("Write the JSON action for this smart home request: {request}\nAction:",
                 "\"Please, {request}\", says grandpa to the box on the shelf. The box sends:")),
)  # fmt: skip
