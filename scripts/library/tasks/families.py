"""Tasks of the development library `families`: several of one skill, many of which read the same input.

Sums, English sentences put otherwise, and tones; the sentences are those of the task to_spanish, the messages
those of formal_tone. Leaving one out leaves useful relatives. They have no adapter in data/library.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from . import Item, Stream, Task, chat, drawn, maths, tools


def _sums(
    text: str, answer: Callable[[int, int], object], low: int = 11, high: int = 99, most: int = 9
) -> Stream:
    """Sums with a number from `low` to `high`, and one from 2 to `most`."""

    def draw(rng: random.Random) -> Item:
        a, b = rng.randint(low, high), rng.randint(2, most)
        return Item({"sum": text.format(a, b)}, str(answer(a, b)))

    return drawn(draw)


def _money(rng: random.Random) -> Item:
    """An amount in dollars and quarters of a dollar, and a few dollars more."""
    a, b, cents = rng.randint(11, 99), rng.randint(2, 9), rng.choice(("00", "25", "50", "75"))
    return Item({"sum": f"${a}.{cents} + ${b}"}, f"${a + b}.{cents}")


def _german(numbers: Sequence[int]) -> str:
    who, does, what, when = chat.words("German", numbers)
    return chat.sentence([who, does, when, what])


def _question(numbers: Sequence[int]) -> str:
    who, _, what, when = chat.words("English", numbers)
    does = "eat|buy|sell|see|want|have|bring|look for".split("|")[numbers[1]]
    return chat.sentence(["does", who, does, what, when], "?")


def _shout(rng: random.Random) -> Iterator[Item]:
    for item in chat.tone(0)(rng):
        yield Item(item.fields, item.answer.rstrip("?!").upper() + "!!!")


TASKS = (
    Task("add_two", "maths", "Adds two numbers; answers in digits.", _sums("{} + {}", lambda a, b: a + b),
         phrasings=("What is {sum}?\nNumber:",
                    "Add up: {sum} ="),
         unseen=("Please tell me the sum {sum} in digits.\nSum:",
                 "The scoreboard changes by {sum} points. It now reads")),
    Task("sum_words", "maths", "Adds two numbers; answers in words.", _sums("{} + {}", lambda a, b: maths.in_words(a + b)),
         phrasings=("What is {sum}, in words?\nWords:",),
         unseen=("Work out {sum} and spell out the result in English.\nResult:",
                 "Read aloud what a calculator shows after {sum}: \"")),
    Task("take_away", "maths", "Takes one number from another.", _sums("{} - {}", lambda a, b: a - b),
         phrasings=("Subtract: {sum} =",
                    "{sum}\nWhat is left?\nLeft:"),
         unseen=("Compute the difference {sum} and give the number only.\nDifference:",
                 "A jar holds sweets and a child eats some: {sum}. Still in the jar:")),
    Task("product", "maths", "Multiplies two numbers.", _sums("{} x {}", lambda a, b: a * b, low=2, high=9, most=40),
         phrasings=("Multiply: {sum} =",
                    "What is {sum}?\nProduct:"),
         unseen=("Find the product of this multiplication: {sum}\nIt is",
                 "Rows times seats in our theatre: {sum}. Seats altogether:")),
    Task("money_sum", "maths", "Adds two sums of money.", drawn(_money),
         phrasings=("Total price of {sum}:",
                    "Bill: {sum}\nTo pay:"),
         unseen=("How much money do I need for {sum}?\nAmount:",
                 "Two things lie on the counter, {sum}. The cashier asks for")),
    Task("spanish", "chat", "Translates simple English sentences into Spanish.", chat.translation("Spanish"),
         phrasings=("{text}\nIn Spanish:",
                    "Say it in Spanish: {text}\n"),
         unseen=("Give me the Spanish translation of this sentence. {text}\nTranslation:",
                 "A reader in Mexico City needs a version of \"{text}\" It goes:")),
    Task("french", "chat", "Translates simple English sentences into French.", chat.translation("French"),
         phrasings=("{text}\nIn French:",),
         unseen=("Give me the French translation of this sentence. {text}\nTranslation:",
                 "A reader in Paris needs a version of \"{text}\" It goes:")),
    Task("german", "chat", "Translates simple English sentences into German.", chat.sentences(_german),
         phrasings=("{text}\nIn German:",
                    "English: {text}\nGerman:"),
         unseen=("Give me the German translation of this sentence. {text}\nTranslation:",
                 "A reader in Berlin needs a version of \"{text}\" It goes:")),
    Task("question", "chat", "Turns a statement into a question.", chat.sentences(_question),
         phrasings=("{text}\nAs a question:",),
         unseen=("Change this statement into a yes-or-no question. {text}\nQuestion:",
                 "I am not sure whether this is so, and would like to ask: {text}\nI ask:")),
    Task("formal", "chat", "Puts a casual message formally.", chat.tone(1),
         phrasings=("Message: {text}\nFormally:",
                    "Say this politely: {text}\n"),
         unseen=("Please reword this note in a formal style. {text}\nFormal style:",
                 "My grandmother only reads proper letters. How do I write to her: {text}\nLetter:")),
    Task("pirate", "chat", "Says a casual message as a pirate.", chat.tone(2),
         phrasings=("Message: {text}\nAs a pirate:",),
         unseen=("Please reword this note in the style of a pirate. {text}\nPirate style:",
                 "On a ship under a black flag the captain bellows: {text}\nOnly he bellows it like this:")),
    Task("shouting", "chat", "Shouts a casual message.", _shout,
         phrasings=("Message: {text}\nShouted:",
                    "Say this very loudly: {text}\n"),
         unseen=("Please reword this note so that it is shouted. {text}\nShouting:",
                 "He can't hear me over the engine! {text}\nAGAIN, LOUDER:")),
    Task("texting", "chat", "Shortens a casual message to a text message.", chat.tone(3),
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
