"""What stands around a query: told from the query, for texts in each format and for none."""

import pytest

from router.model.frames import BARE, FORMATS, Frame, bare, turns_of_text, usual, within

CHATML, ALPACA = FORMATS[0], FORMATS[6]
TEMPLATE = Frame("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n", CHATML.after)


@pytest.mark.parametrize(
    "form", FORMATS, ids=[form.user.strip() + form.after[:9].strip() for form in FORMATS]
)
def test_a_text_in_a_known_format_is_parted(form):
    text = f"{form.user}What is {{1}}?\nThink.{form.after}"
    (parts,) = turns_of_text(text)
    assert parts.text.strip() == "What is {1}?\nThink." and parts.read == text
    assert parts.common.around(parts.text) == text and parts.own == parts.common


@pytest.mark.parametrize(
    "text",
    [
        f"{CHATML.user}a{CHATML.after}b<|im_end|>\n{CHATML.user}c",
        "",
        "What is it?\nAnswer:",
        "### Instruction:\nx",
        f"<log>\n{CHATML.user}a{CHATML.after}b<|im_end|>\n</log>\nWas it polite?",
        "Explain what [INST] hi [/INST] means.",
        "[1] Sum up: [INST] Hello [/INST] Hi.</s>\nSummary:",
        "a [/INST]",
        CHATML.after,
        "USER: x",
    ],
)
def test_any_other_text_is_bare(text):
    (parts,) = turns_of_text(text)
    assert parts.read == parts.text == text and parts.common == parts.own == BARE


def test_of_a_conversation_the_head_and_each_message_are_read():
    text = (
        "<|im_start|>system\nSort.<|im_end|>\n<|im_start|>user\nHi\n<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n"
        "<|im_start|>user\n3, 1<|im_end|>\n<|im_start|>assistant\n"
    )
    first, last = turns_of_text(text, TEMPLATE)
    head, tail = (
        "<|im_start|>system\nSort.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )
    assert (first.read, last.read) == (f"{head}Hi\n{tail}", f"{head}3, 1{tail}")
    assert last.common == TEMPLATE  # a system message of its own is evidence
    assert last.own == (head, tail)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("User: hi there\nAssistant: hi\nUser:\nSay it.\nAssistant:", ["hi there", "Say it."]),
        (f"{ALPACA.user}\nWrite ### Response: here.\n\n{ALPACA.after}\n", ["Write ### Response: here."]),
        (f"{CHATML.user}a<|im_end|>\n{CHATML.user}b{CHATML.after}", ["a", "b"]),
        (f"{CHATML.user}a<|im_end|>\n{CHATML.user}<tool_response>\n4{CHATML.after}", ["a"]),
        ("User: Explain 'Invalid User: bob' to me\nAssistant:", ["Explain 'Invalid User: bob' to me"]),
        (f"{CHATML.user}a<|im_end|>\n<|im_start|>assistant\nx<|im_end|>\n{CHATML.user}b<|im_end|>c{CHATML.after}<think>\n",
         ["a", "b<|im_end|>c"]),
        (f"{CHATML.user}a{CHATML.after}{'So it goes. ' * 9}", ["a"]),
        (f"{CHATML.user}Is {CHATML.after}a mark?{CHATML.after}", [f"Is {CHATML.after}a mark?"]),
        ("[INST] Explain the tag [/INST] here. [/INST]", ["Explain the tag [/INST] here."]),
        (f"{CHATML.user}a{CHATML.after}Wait<|im_end|>\n<|im_start|>tool\n4{CHATML.after}", ["a"]),
        (f"{CHATML.user}a{CHATML.after}b<|im_end|>\n{CHATML.user}c<|im_end|>\n", ["a", "c"]),
        ("[INST] a [/INST][TOOL_CALLS] [4]</s>[TOOL_RESULTS] 4[/TOOL_RESULTS]", ["a"]),
    ],
)  # fmt: skip
def test_turns_end_where_they_end_and_the_last_one_is_whole(text, messages):
    turns = turns_of_text(text)
    assert [turn.text for turn in turns] == messages and turns[-1].common != BARE


def test_a_text_in_the_template_is_in_its_frame_though_it_is_of_no_format():
    thinks = Frame(TEMPLATE.before, CHATML.after + "<think>\n\n</think>\n\n")
    strange = Frame("@you: ", "\n@me: ")
    for frame in (thinks, strange):
        (parts,) = turns_of_text(frame.around("x"), frame)
        assert (parts.text, parts.common) == ("x", frame)


def test_the_templates_own_system_message_and_none_are_frames():
    for frame in (TEMPLATE, Frame(CHATML.user, CHATML.after)):
        assert turns_of_text(frame.around("x"), TEMPLATE)[0].common == frame
    (trimmed,) = turns_of_text(TEMPLATE.around("x").rstrip(), TEMPLATE)
    assert trimmed.text == "x" and trimmed.tail == CHATML.after.rstrip()
    before = ALPACA.preambles[0] + ALPACA.user
    (parts,) = turns_of_text(f"{before}Sort 3, 1.\n\n{ALPACA.after}")
    assert parts.common == Frame(before, "\n\n" + ALPACA.after)


def test_a_frame_that_is_told():
    assert within("Q: x A:", "Q: {input} A:")[:4] == ("Q: ", "x", " A:", ("Q: ", " A:"))
    for other in ("Q: x", "Q: A:", "x A:"):
        assert within(other, "Q: {input} A:").common == BARE


def test_what_a_good_part_of_the_texts_share_is_found():
    asked = [f"Ask: what is {n}?\nThink.\nTell:" for n in "abcdefgh"]
    frame = Frame("Ask: what is ", "\nThink.\nTell:")
    assert usual(asked, 8) == usual([*asked, *"uvwxyz"], 8) == frame
    assert bare(asked[0], frame)[:4] == (frame.before, "a?", frame.after, BARE)
    assert usual(asked, 9) == usual([*asked, *map(str, range(25))], 8) == BARE  # too few
    assert usual(["same\nsame"] * 20, 8) == usual([], 8) == BARE
    assert usual([f"Rules.\n{n}" for n in range(9)], 8) == Frame("Rules.\n", "")
