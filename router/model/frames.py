"""What stands around a query: a chat template, an instruction's frame. It says nothing of the query.

A text in a frame is unlike every text without one, so the generic prompts that a query is compared with stand
in its frame, too. Texts only: knows no model and no adapter.
"""

from __future__ import annotations

from typing import NamedTuple


class Frame(NamedTuple):
    """The texts before and after a query."""

    before: str = ""
    after: str = ""

    def around(self, text: str) -> str:
        """A text in the frame."""
        return f"{self.before}{text}{self.after}"


BARE = Frame()


class Format(NamedTuple):
    """How a family of models or data sets writes turns.

    Attributes:
        user: before each message of the user; where it ends in no line end, with the blanks that follow.
        after: after the last one: the end of the turn, and the start of the answer.
        preambles: what may stand before all and says nothing.
    """

    user: str
    after: str
    preambles: tuple[str, ...] = ()


_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n",
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. ",
)
FORMATS = (
    Format("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),  # ChatML: Qwen, SmolLM
    Format(
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),  # Llama 3
    Format("<start_of_turn>user\n", "<end_of_turn>\n<start_of_turn>model\n"),  # Gemma
    Format("<|user|>\n", "<|end|>\n<|assistant|>\n"),  # Phi 3
    Format("<|user|>\n", "</s>\n<|assistant|>\n"),  # Zephyr
    Format("[INST]", "[/INST]"),  # Llama 2 and Mistral
    Format("### Instruction:", "### Response:", _ALPACA),  # Alpaca
    Format("### Human:", "### Assistant:"),
    Format("USER:", "ASSISTANT:", _VICUNA),  # Vicuna
)


class Parts(NamedTuple):
    """A query in its parts. What routing reads is `head + text + tail`.

    Attributes:
        head: before the user's last message, without earlier turns; with the system message.
        text: the user's last message, or all of a plain text.
        tail: after it.
        plain: the head that there would be without a system message.
    """

    head: str
    text: str
    tail: str
    plain: str

    @property
    def read(self) -> str:
        """What routing reads."""
        return f"{self.head}{self.text}{self.tail}"

    @property
    def own(self) -> Frame:
        """Its frame, if its system message is part of it."""
        return Frame(self.head, self.tail)

    @property
    def common(self) -> Frame:
        """Its frame, if its system message is part of the query."""
        return Frame(self.plain, self.tail)


def within(text: str, frame: str) -> Parts:
    """A plain text in its parts, if it stands in a frame that is told with `{input}` in the query's place."""
    before, _, after = frame.partition("{input}")
    if len(text) >= len(before) + len(after) and text.startswith(before) and text.endswith(after):
        return Parts(before, text[len(before) : len(text) - len(after)], after, before)
    return Parts("", text, "", "")


def parts_of_text(text: str, template: Frame | None = None) -> Parts:
    """A plain text in its parts, in the first of FORMATS that it is written in.

    Args:
        template: the frame of the base model's template, for its default system message.
    """
    whole = text.rstrip()
    for user, after, preambles in FORMATS:
        if not whole.endswith(after.rstrip()) or user not in text:
            continue
        end = len(whole) - len(after.rstrip())
        end = len(text[:end].rstrip())
        first, last = (_after(text, find(user, 0, end), user) for find in (text.find, text.rfind))
        if not len(user) <= last <= end:
            continue
        head, asked, tail = text[:first], text[last:end], text[end:]
        user = text[text.find(user) : first]
        plain = user
        if template is not None and template.after.strip() == tail.strip() and template.before.endswith(user):
            plain = template.before
        if head in (user, template and template.before, *(preamble + user for preamble in preambles)):
            plain = head
        return Parts(head, asked, tail, plain)
    return Parts("", text, "", "")


def _after(text: str, start: int, user: str) -> int:
    """Where the user's message begins, of which the mark begins at `start`; 0 where there is none."""
    if start < 0:
        return 0
    start += len(user)
    blanks = 0 if user.endswith("\n") else len(text) - start - len(text[start:].lstrip())
    return start + blanks
