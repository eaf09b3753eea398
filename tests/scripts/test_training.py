"""What adapters are trained and tested on: targets as in the query files, answers counted by hand."""

import pytest

from router.model.answer import encode, generate
from router.model.base import load_base
from scripts.library import make_data
from scripts.library.tasks import Item, Task
from scripts.library.train import accuracy, phrase

TASK = Task(
    "count", "maths", "Counts.", "here", "Apache-2.0", lambda rng: iter(()),
    ("{n} and?", "After {n}:"), ("{n}?",),
)  # fmt: skip


def test_a_target_is_the_answer_or_the_index_of_the_choice():
    assert Item({}, "b").target == "b"
    assert Item({}, "b", ("a", "b")).target == "1"


def test_rows_of_a_labelled_file_are_in_the_columns_of_the_kit():
    items = [Item({"n": "1"}, "2"), Item({"n": "2"}, "3", ("4", "3"))]
    rows = make_data.labelled(TASK, items, ["1?", "2?"], [0, 0])
    assert rows == [
        [0, "1?", "2", "", "generation", "count", "maths", 0],
        [1, "2?", "1", ["4", "3"], "multiple_choice", "count", "maths", 0],
    ]


def test_each_phrasing_is_used_equally_often():
    prompts = phrase(TASK, [Item({"n": str(n)}, "") for n in range(10)], seed=0)
    assert sum(prompt.endswith("and?") for prompt in prompts) == 5
    assert all(str(n) in prompt for n, prompt in enumerate(prompts))


def test_accuracy_counts_what_the_model_says(tiny_base):
    base = load_base(str(tiny_base), "cpu", "float32")
    prompts = ["one", "two", "three", "four"]
    said = [
        generate(base.model, base.tokenizer, encode(base.tokenizer, [prompt]), 64)[0].text.strip()
        for prompt in prompts
    ]
    items = [Item({}, said[0]), Item({}, said[1] + "!"), Item({}, said[2]), Item({}, said[3])]
    assert accuracy(base.model, base.tokenizer, prompts, items) == pytest.approx(0.75)
    # Of two choices one is right, whichever the model takes.
    one, other = (
        accuracy(base.model, base.tokenizer, prompts, [Item({}, answer, ("yes", "no"))] * 4)
        for answer in ("yes", "no")
    )
    assert one + other == pytest.approx(1)
