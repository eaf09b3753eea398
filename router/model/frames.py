"""Frames: the text around a query, as of a chat template or an instruction, which says nothing of it.

A text in a frame is unlike every text without one, so the generic prompts that a query is compared with stand
in its frame, too. Texts only: knows no model and no adapter.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple


class Frame(NamedTuple):
    """The texts before and after a query."""

    before: str = ""
    after: str = ""

    def around(self, text: str) -> str:
        """A text in the frame."""
        return f"{self.before}{text}{self.after}"

    @property
    def name(self) -> str:
        """`bare`, or eight digits of a hash: a frame may hold what nobody else is to read."""
        text = "\0".join(self).encode("utf-8", "surrogatepass")
        return hashlib.sha256(text).hexdigest()[:8] if any(self) else "bare"


BARE = Frame()
# Scripts without spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese.
JOINED = "\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{JOINED}]{{1,2}}|[^\s{JOINED}]+")


TAG = re.compile(r"<[^<>]*>|\[[^\[\]]*\]")
# What a chat begins with, if not with the tag of a user's turn.
OPENING = r"(<s>|<bos>|<\|begin_of_text\|>)?\s*(<\|system\|>|\[AVAILABLE_TOOLS\]|\[SYSTEM_PROMPT\]|{})"
RESULT = "<tool_response>"  # of a tool, which Qwen's template writes as a turn of the user
BEGUN = 40  # characters of an answer that a text in a template may begin


class Format(NamedTuple):
    """How a family of models or data sets writes turns."""

    user: str  # before each message of the user; where it ends in no line end, with the blanks that follow
    after: str  # after the last one: the end of the turn, and the start of the answer
    preambles: tuple[str, ...] = ()  # what may stand before all and says nothing


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
ALPACA = Frame(f"{_ALPACA[0]}### Instruction:\n", "\n\n### Response:\n")
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
    Format("### User:", "### Assistant:"),
    Format("USER:", "ASSISTANT:", _VICUNA),  # Vicuna
    Format("User:", "Assistant:"),
    Format("Human:", "Assistant:"),
)


class Parts(NamedTuple):
    """A query in its parts. What routing reads is `head + text + tail`."""

    head: str  # before a message of the user, without other turns; with the system message
    text: str  # the message, or all of a plain text
    tail: str  # after it
    common: Frame  # the frame to compare in, if the system message is part of the query
    later: int = 0  # how many messages of the user follow

    @property
    def read(self) -> str:
        """The text that routing reads."""
        return f"{self.head}{self.text}{self.tail}"

    @property
    def words(self) -> int:
        """How many words the message has; in scripts without spaces two letters count as one."""
        return len(WORD.findall(self.text))

    @property
    def own(self) -> Frame:
        """The frame to compare in, if the system message is part of it."""
        return Frame(self.head, self.tail)


def bare(text: str, frame: Frame = BARE) -> Parts:
    """Splits a plain text at the edges of a frame, if it has them; else all of it is the message."""
    before, after = frame
    if len(text) >= len(before) + len(after) and text.startswith(before) and text.endswith(after):
        return Parts(before, text[len(before) : len(text) - len(after)], after, BARE)
    return Parts("", text, "", BARE)


def framing(text: str) -> Frame:
    """The frame that a text tells with `{input}` in the query's place."""
    before, _, after = text.partition("{input}")
    return Frame(before, after)


def within(text: str, frame: str) -> Parts:
    """A plain text in its parts, if it stands in a frame that is told with `{input}` in the query's place."""
    parts = bare(text, framing(frame))
    return parts._replace(common=parts.own)


def alike(rows: Sequence[Sequence[Any]]) -> int:
    """How many entries the rows have alike from the start."""
    return sum(1 for _ in takewhile(lambda entries: len(set(entries)) == 1, zip(*rows, strict=False)))


def usual(texts: Sequence[str], least: int) -> Frame:
    """The frame of a good part of plain texts: those that begin, or end, with the most usual line.

    Args:
        least: how many have to share it; and they have to be a quarter of all.

    Example:
        >>> usual([f"Question: {n}\\nAnswer:" for n in range(9)], least=8)
        Frame(before='Question: ', after='\\nAnswer:')
    """
    lined = [text for text in texts if "\n" in text.strip()]
    counts = Counter((end, text.splitlines()[end]) for end in (0, -1) for text in lined)
    # Of equally many one by its text, whatever the order of the queries.
    (end, line), count = max(counts.items(), key=lambda one: (one[1], one[0]), default=((0, ""), 0))
    if count < max(least, len(texts) / 4):
        return BARE
    some = [text for text in lined if text.splitlines()[end] == line]
    start, back = alike(some), alike([text[::-1] for text in some])
    before, after = some[0][:start], some[0][len(some[0]) - back :]
    # Not within a word: the first letter that all happen to share is their own.
    before, after = (re.sub(r"\A\S+", "", edge) for edge in (before[::-1], after))
    before = before[::-1]  # from its end, since a search for the last word takes the square of the length
    return Frame(before, after) if len(before) + len(after) < min(map(len, some)) else BARE


def turns_of_text(text: str, template: Frame | None = None, form: Format | None = None) -> list[Parts]:
    """A plain text in the first of FORMATS that it is written in: each message of the user, in its parts.

    Answers and results of tools after the last message are left out, but for the start of an answer.

    Args:
        template: the frame of the base model's template, for its default system message.
        form: how that template writes turns, for one that is none of FORMATS; else its text is one message.
    """
    for user, after, preambles in [*FORMATS, *filter(None, [form])]:
        mark = after.rstrip()  # the end of a message and, after a tag, the start of the answer
        tag = TAG.match(mark)
        end = tag[0] if tag else mark  # of a message
        head, turns = _turns(text, user, end)
        role = TAG.match(user)
        # Whether the text begins as the format does, so that anything may follow.
        opened = bool(role and re.match(OPENING.format(re.escape(role[0])), text))
        if not turns or not (last := _last(turns[-1], mark, end, opened)):
            continue
        message, tail = last
        tail = tail or (template.after if template and template.after.lstrip().startswith(mark) else after)
        written = head[head.rindex(user) :]
        plain = written
        if template and template.after.strip() == tail.strip() and template.before.endswith(written):
            plain = template.before
        if head in (written, template and template.before, *(before + written for before in preambles)):
            plain = head
        asked = [_message(turn.partition(end)[0], end) for turn in turns[:-1]] + [message]
        readable = [turn for turn in asked if turn.strip() and not turn.lstrip().startswith(RESULT)]
        return [Parts(head, turn, tail, Frame(plain, tail)) for turn in readable] or [bare(text)]
    if template and (parts := bare(text, template)).own == template:
        return [parts._replace(common=template)]
    return [bare(text)]


def _turns(text: str, user: str, end: str) -> tuple[str, list[str]]:
    """The text up to the first message of the user, with its mark; and each message with its end."""
    blanks = "" if user.endswith("\n") else r"\s*"
    before, *more = re.split(f"({re.escape(user)}{blanks})", text)
    turns = list[list[str]]()
    ended = True
    for mark, part in zip(more[::2], more[1::2], strict=True):
        if ended:
            turns.append([])
        else:
            turns[-1].append(mark)
        turns[-1].append(part)
        ended = end in part
    return before + "".join(more[:1]), ["".join(parts) for parts in turns]


def _message(text: str, end: str) -> str:
    """A message before its end; blanks before a tag such as `<|im_end|>` belong to it."""
    return text if end.startswith("<") else text.rstrip()


def _last(turn: str, mark: str, end: str, opened: bool) -> tuple[str, str] | None:
    """The last message of the user, and what follows it, "" for too much; None if it is not asked."""
    tag = TAG.match(end)
    first, there, _ = turn.partition(mark)
    whole, _, rest = turn.rpartition(mark)
    if there and tag and opened and end in whole[len(first + mark) :]:  # more turns, of tools
        return _message(first, end), ""
    message = _message(whole, end)
    begun = rest.strip()
    started = tag and (opened or end.startswith("<")) and len(begun) <= BEGUN and end not in begun
    if there and (not begun or started):
        return message, turn[len(message) :]
    if tag and opened and not there:  # nor is an answer
        whole, there, rest = turn.rpartition(end)
        return (_message(whole, end), "") if there and not rest.strip() else None
    return (message, "") if tag and opened else None
