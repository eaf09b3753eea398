"""Conversations as a model reads them: the tokenizer's own chat template, or one from a file."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from router.constants import TEMPLATE, TOKENIZER
from router.model.answer import encode
from router.model.frames import Format, Frame, Parts, alike
from router.queries.conversation import SYSTEM, Message, content
from router.system.errors import InputError, reason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
MARK = "\u2063proto-route\u2063"  # stands for the user's message; nobody writes it
LARGEST = 1 << 20  # bytes of a template file
MOST = 16 << 20  # bytes of a tokenizer's configuration
# What a template writes for today's date where routing reads it, so that a frame is the same tomorrow; and
# another date, none of whose parts begins alike.
DATE, OTHER = (
    dict(zip(("%d", "%m", "%b", "%B", "%Y", "%y", "%A"), spelt.split(), strict=True))
    for spelt in ("01 01 Jan January 2025 25 Wednesday", "22 12 Oct October 3034 34 Friday")
)
CURE = "make the run or the router with --chat_template FILE"
NEUTRAL: Message = {"role": "system", "content": "You are a helpful assistant."}


class Template:
    """How a base model is written to.

    Args:
        tokenizer: of the base model; its template is used where no other is given.
        source: a Jinja template; None takes the tokenizer's.
        name: where it is from, for errors.

    Attributes:
        first: the token that begins any text that is read, "" if there is none.
        refused: whether it has refused a conversation that was `tried`.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, source: str | None = None, name: str = "the base model"
    ) -> None:
        self.tokenizer, self.source, self.name, self.refused = tokenizer, source, name, False
        bos = tokenizer.bos_token
        # `encode` puts it before what is read of a text, so that a template's own would be the second.
        self.first = bos if bos and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else ""

    @property
    def jinja(self) -> Any:
        """The template; None if there is none, and a tokenizer may have several by name."""
        template = self.source or getattr(self.tokenizer, "chat_template", None)
        return template.get("default", template) if isinstance(template, dict) else template

    def text(
        self, messages: Sequence[Message], query: str = "", date: Mapping[str, str] | None = None
    ) -> str:  # fmt: skip
        """A conversation up to where the answer begins.

        Args:
            query: its id, for the error.
            date: how a template that writes the date spells each part of it; None is today's.

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        which = f"query {query}: " if query else ""
        if not self.jinja:
            raise InputError(
                f"{which}expected a chat template, since this is a conversation, but the base model has "
                f"none; {CURE}"
            )
        source = self.source
        if date and isinstance(self.jinja, str) and "strftime_now" in self.jinja:
            filters = "".join(f"| replace('{code}', '{spelt}')" for code, spelt in date.items())
            macro = f"{{% macro strftime_now(format) %}}{{{{ format {filters} }}}}{{% endmacro %}}\n"
            source = macro + self.jinja
        plain = [{**message, "content": content(message)} for message in messages]  # most know no parts
        if any(message["role"] == "developer" for message in plain) and "developer" not in self.jinja:
            plain = [
                message | {"role": "system"} if message["role"] == "developer" else message
                for message in plain
            ]
        how: dict[str, Any] = {"chat_template": source, "tokenize": False, "add_generation_prompt": True}
        try:
            if any(message.get("tool_calls") for message in plain):
                with suppress(Exception):  # a template may want what OpenAI has
                    return str(self.tokenizer.apply_chat_template(_with_objects(plain), **how))
            return str(self.tokenizer.apply_chat_template(plain, **how))
        except Exception as error:  # whatever a template leads to
            raise InputError(
                f"{which}the chat template of {self.name} does not take its messages ({reason(error)})"
                + ("" if self.source else f"; {CURE}")
            ) from error

    def ids(self, messages: Sequence[Message], query: str = "") -> list[int]:
        """A conversation's token ids. Only the template writes special ones, as on servers."""
        return encode(self.tokenizer, [self.text(messages, query)], special=False)[0]

    def tried(self, messages: Sequence[Message], query: str = "") -> list[int] | None:
        """A conversation's token ids; None, and once a warning, where the template refuses the messages.

        One that knows no system message refuses it.
        """
        try:
            return self.ids(messages, query)
        except InputError as error:
            if not self.refused:
                log.warning("%s; such chats are asked in the template of the others", error)
            self.refused = True
            return None

    @cached_property
    def frame(self) -> Frame:
        """The text around a user's message without any system message but the template's own.

        A template that takes no user alone gets a NEUTRAL one.

        Raises:
            InputError: there is no template, or it does not write the user's message.
        """
        return self._bare(DATE)

    def _bare(self, date: Mapping[str, str]) -> Frame:
        try:
            return self._around([], date=date)
        except InputError:
            if not self.jinja:
                raise
            return self._around([NEUTRAL], date=date)

    @cached_property
    def usable(self) -> Frame | None:
        """The frame; None where there is none."""
        try:
            return self.frame
        except InputError:
            return None

    @cached_property
    def format(self) -> Format | None:
        """How it writes turns; None where that cannot be told from a conversation of three messages."""
        if not self._three:
            return None
        before = self.frame.before
        answer, between, after = self._three
        # Without what begins the answer, such as `<think>`, nor a half tag.
        after = re.sub(r"[<\[][^>\]]*\Z", "", after[: alike([after, answer])]) or after
        user = between[len(between) - alike([before[::-1], between[::-1]]) :]  # with which both end
        user = re.sub(r"\A[^<]*>", "", user.removeprefix(after[: after.find(">") + 1])).lstrip()  # of others
        return Format(user, after) if user.strip() and after.strip() else None

    @cached_property
    def _three(self) -> tuple[str, str, str] | None:
        """The text before an answer between two messages of the user, after it, and after both."""
        asked, said = {"role": "user", "content": MARK}, {"role": "assistant", "content": "said"}
        try:
            _, between, after = self.text([asked, said, asked], date=DATE).split(MARK)
        except (InputError, ValueError):
            return None
        before, _, between = between.rpartition("said")
        return before, between, after

    @cached_property
    def _date(self) -> tuple[str, str]:
        """The text before the date that the template writes, and the line with it as routing writes it."""
        before = self.frame.before
        start = before[: alike([before, self._bare(OTHER).before])]
        return start, before[len(start) :].partition("\n")[0]

    def undated(self, text: str) -> str:
        """A text that was written in the template, on whichever day, as routing writes it."""
        start, line = self._date if self.usable else ("", "")
        written, end, rest = text.removeprefix(start).partition("\n")
        dated = line and text.startswith(start) and re.sub(r"\w", "", written) == re.sub(r"\w", "", line)
        return f"{start}{line}{end}{rest}" if dated else text

    @cached_property
    def trims(self) -> bool:
        """Whether it takes blanks from a message's ends."""
        padded = {"role": "user", "content": f"\n\t{MARK}\t\n"}
        for messages in ([padded], [NEUTRAL, padded]):
            with suppress(InputError):
                return padded["content"] not in self.text(messages, date=DATE)
        return False

    @cached_property
    def end(self) -> int | None:
        """The token that ends an answer, if the template writes one after an earlier answer; else None."""
        after = self._three[1].lstrip() if self._three else ""
        ids = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if is_mark(self.tokenizer, ids) else None

    def turns(self, messages: Sequence[Message], query: str = "") -> list[Parts]:
        """Each message of the user that has text, with the system message alone, in the template.

        Several system messages are one where the template takes no more.

        Raises:
            InputError: there is no template, or it refuses the messages.
        """
        system = [message for message in messages if message["role"] in SYSTEM]
        try:
            frame = self._around(system, query)
        except InputError:  # many take one alone
            whole = {"role": "system", "content": "\n\n".join(map(content, system))}
            frame = self._around([whole] if system else [], query)
        asked = (content(message) for message in messages if message["role"] == "user")
        common = Frame(self.frame.before, frame.after)
        read = (text.strip() if self.trims else text for text in asked if text.strip())
        return [Parts(frame.before, text, frame.after, common) for text in read]

    def _around(self, system: Sequence[Message], query: str = "", date: Mapping[str, str] = DATE) -> Frame:
        text = self.text([*system, {"role": "user", "content": MARK}], query, date)
        before, mark, after = text.partition(MARK)
        if not mark or MARK in after:
            raise InputError(f"{self.name}: expected a chat template that writes the user's message once")
        return Frame(before.removeprefix(self.first), after)


def is_mark(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> bool:
    """Whether what follows a message begins with a token of its own, as chat templates end a turn."""
    return bool(ids) and ids[0] in tokenizer.added_tokens_decoder


def template_of(tokenizer: PreTrainedTokenizerBase, file: Path | None) -> Template:
    """The template in a file, or the tokenizer's own.

    Raises:
        InputError: the file cannot be read, or is no template that writes what a user says.
    """
    if file is None:
        return Template(tokenizer)
    try:
        if file.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        template = Template(tokenizer, file.read_text("utf-8-sig"), str(file))
    except (OSError, ValueError) as error:
        raise InputError(f"--chat_template {file}: expected a Jinja template ({error})") from error
    _ = template.frame
    return template


def template_for(tokenizer: PreTrainedTokenizerBase, file: Path | None, folders: Iterable[Path]) -> Template:
    """The template in a file, or the tokenizer's own, or the one that most of the adapters' folders bring."""
    default = template_of(tokenizer, file)
    if default.jinja:
        return default
    templates = [template for folder in folders if (template := brought(tokenizer, folder))]
    counts = Counter(template.jinja for template in templates)
    # Of equally many the first.
    return max(templates, key=lambda template: counts[template.jinja], default=default)


def brought(tokenizer: PreTrainedTokenizerBase, folder: Path) -> Template | None:
    """The template that the folder of an adapter or a variant brings; None if it brings none that is one.

    It is in a file of its own, or in the tokenizer's configuration, as older versions save it.
    """
    file, older = folder / TEMPLATE, folder / TOKENIZER
    try:
        if file.is_file():
            return template_of(tokenizer, file)
        if not older.is_file() or older.stat().st_size > MOST:
            return None
        source = json.loads(older.read_text("utf-8")).get("chat_template")
        if isinstance(source, list):  # several by name
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source or not isinstance(source, str):
            return None
        if len(source.encode()) > LARGEST:  # refuses half a character, too
            raise ValueError(f"more than {LARGEST} bytes")
        template = Template(tokenizer, source, str(older))
        _ = template.frame
        return template
    except (InputError, OSError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        log.warning("%s: its chat template is not used (%s)", folder, reason(error))
        return None


def _with_objects(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with arguments of tools as most templates want them: objects, which OpenAI spells in JSON."""
    copies = deepcopy(list(messages))
    for message in copies:
        for call in message.get("tool_calls") or ():
            with suppress(LookupError, TypeError, ValueError):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return copies
