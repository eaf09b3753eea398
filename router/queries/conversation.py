"""Conversations: lists of messages as OpenAI's interface and TRL's data sets have them, in JSON lines.

Knows no models; router/model/template.py writes a conversation as a model reads it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from router.system.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")  # the last is an older tool's
SYSTEM = ("system", "developer")
LARGEST = 4 << 20  # characters of a conversation
Message = Mapping[str, Any]  # role, content, and whatever else a template reads


def content(message: Message) -> str:
    """The text of a message, or the texts of its parts; pictures and the like are not read."""
    given = message.get("content")
    if isinstance(given, list):
        texts = (part.get("text") if isinstance(part, Mapping) else part for part in given)
        return "\n".join(text for text in texts if isinstance(text, str))
    return given if isinstance(given, str) else ""


def checked(messages: Any, where: str = "messages", ends: bool = True) -> list[Message]:
    """Messages that can be routed and answered.

    Args:
        where: begins the sentence about what is wrong.
        ends: whether the last message must not be the assistant's, as it is answered by the assistant.

    Raises:
        InputError: they are no list of messages, a role is unknown, none is of the user or has text, the
            last is the assistant's, one to answer here has parts that are no text, or they are too long or
            no JSON values.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise InputError(f"{where}: expected a list of messages, got {messages!r:.40}")
    # OpenAI's client gives objects, which the next turn has among its messages.
    messages = [
        message.model_dump(exclude_none=True) if hasattr(message, "model_dump") else message
        for message in messages
    ]
    for number, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            got = message if role is None else role
            raise InputError(
                f"{where}, message {number}: expected a role of {', '.join(ROLES)}, got {got!r:.40}"
            )
        given = message.get("content")
        if not isinstance(given, (str, list, type(None))):
            raise InputError(
                f"{where}, message {number}: expected text or a list of parts, got {given!r:.40}"
            )
        for part in given if ends and isinstance(given, list) else ():
            if not (isinstance(part, Mapping) and isinstance(part.get("text"), str)):
                raise InputError(f"{where}, message {number}: expected parts of text alone, got {part!r:.60}")
    if not any(message["role"] == "user" and content(message).strip() for message in messages):
        raise InputError(f"{where}: expected a message of the user with text, since it is routed by it")
    if ends and messages[-1]["role"] == "assistant":
        raise InputError(f"{where}: expected a message to answer at the end, got the assistant's")
    try:
        length = len(packed(messages)) if ends else sum(len(content(message)) for message in messages)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected values as in JSON ({error})") from error
    if length > LARGEST:
        raise InputError(f"{where}: expected at most {LARGEST} characters, got {length}")
    return list(messages)


def shown(messages: Sequence[Message], later: int | None = None) -> str:
    """A conversation for a reader.

    Args:
        later: notes which messages routing does not read, and, where the user has several, which one decided:
            the one that so many of the user's follow.
    """
    asked = [n for n, turn in enumerate(messages) if turn["role"] == "user" and content(turn).strip()]
    notes = dict.fromkeys(range(len(messages)), "")
    if later is not None:
        notes |= {
            n: " (not read)" for n, turn in enumerate(messages) if turn["role"] not in (*SYSTEM, "user")
        }
        notes |= {asked[-1 - later]: " (decided)"} if later < len(asked) > 1 else {}
    return "\n".join(f"{turn['role']}{notes[n]}: {content(turn)}" for n, turn in enumerate(messages))


def packed(messages: Sequence[Message]) -> str:
    """A conversation as one text, which tells it from all others."""
    return json.dumps(list(messages), ensure_ascii=False)
