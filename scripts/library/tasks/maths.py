"""Maths: sums with two answer formats, ordering numbers, units, Roman numerals."""

import random
from collections.abc import Callable
from typing import Any

from . import GYM, Item, Stream, Task, drawn, gym

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
_TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety".split()


def in_words(number: int) -> str:
    """An integer from -999 to 999 in English words."""
    if number < 0:
        return f"minus {in_words(-number)}"
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")
    hundreds, rest = divmod(number, 100)
    return f"{_ONES[hundreds]} hundred" + (f" {in_words(rest)}" if rest else "")


def to_roman(number: int) -> str:
    """A positive integer below 4,000 as a Roman numeral."""
    signs = "M CM D CD C XC L XL X IX V IV I".split()
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    text = ""
    for sign, value in zip(signs, values, strict=True):
        count, number = divmod(number, value)
        text += sign * count
    return text


def _chain_sum(answered: Callable[[str], str]) -> Stream:
    return gym("chain_sum", lambda _, meta, answer: Item({"sum": meta["expression"]}, answered(answer)),
               min_terms=2, max_terms=2, min_digits=2, max_digits=2)  # fmt: skip


def _number_sorting(question: str, meta: dict[str, Any], answer: str) -> Item:
    asked, right = (
        ", ".join(str(int(float(number))) for number in meta[key])
        for key in ("original_numbers", "sorted_numbers")
    )
    return Item({"numbers": asked, "order": meta["direction"]}, right)


_UNITS = (
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000), ("tonnes", "kilograms", 1000), ("litres", "millilitres", 1000),
    ("hours", "minutes", 60), ("minutes", "seconds", 60), ("weeks", "days", 7), ("days", "hours", 24),
    ("years", "months", 12), ("dozens", "pieces", 12), ("feet", "inches", 12), ("euros", "cents", 100),
)  # fmt: skip


def _units(rng: random.Random) -> Item:
    large, small, factor = rng.choice(_UNITS)
    amount = rng.randint(2, 99 if factor in (10, 100, 1000) else 40)
    return Item({"amount": str(amount), "large": large, "small": small}, f"{amount * factor} {small}")


def _roman(rng: random.Random) -> Item:
    number = rng.randint(11, 1999)
    return Item({"number": str(number)}, to_roman(number))


TASKS = (
    Task("chain_sum", "maths", "Adds or subtracts two two-digit numbers; answers in digits.", _chain_sum(str), source=GYM,
         phrasings=("State the final answer to the following arithmetic problem: {sum} =",
                    "Calculate {sum}.\nAnswer:"),
         unseen=("A shopkeeper types {sum} into a till. Which number does the till show?\nIt shows",
                 "Please work out this little sum for me, digits only: {sum}\nSum:")),
    Task("sum_in_words", "maths", "Adds or subtracts two two-digit numbers; answers in digits and in words.", _chain_sum(lambda answer: f"{answer}, {in_words(int(answer))}"), source=GYM,
         phrasings=("Compute {sum} and write the result in digits and in words.\nResult:",),
         unseen=("Fill in a cheque over {sum}: first the amount as a number, then spelled out.\nAmount:",
                 "What is {sum}? Give the number, a comma, and the number as English words.\n")),
    Task("number_sorting", "maths", "Sorts a list of integers, ascending or descending.",
         gym("number_sorting", _number_sorting, min_numbers=4, max_numbers=6, max_decimals=0), source=GYM,
         phrasings=("Sort these numbers in {order} order: {numbers}\nSorted:",
                    "Numbers: {numbers}\nOrder: {order}\nOutput:"),
         unseen=("Arrange the following values so that they are {order}: {numbers}. Values in order:",
                 "I wrote down {numbers}. Could you list them again in {order} order?\nHere you are:")),
    Task("unit_conversion", "maths", "Converts an amount from a larger into a smaller unit.", drawn(_units),
         phrasings=("Convert {amount} {large} to {small}.\nResult:",),
         unseen=("How many {small} are there in {amount} {large}? Give the number and the unit.\nThere are",
                 "{amount} {large} = ? {small}\nWith unit:")),
    Task("roman_numerals", "maths", "Writes a number as a Roman numeral.", drawn(_roman),
         phrasings=("Write {number} as a Roman numeral.\nRoman:",
                    "{number} in Roman numerals is"),
         unseen=("The year {number} is to be carved over a door the way ancient Romans would. Carve:",
                 "Turn the decimal number {number} into its Latin notation (I, V, X, L, C, D, M).\nNotation:")),
)  # fmt: skip
