"""What a request is routed by: its prompt, or one message of its conversation, as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.serving.names import AUTO


class NoText(ValueError):
    """A request has no text to be routed by, or more than one prompt."""


def text_of(body: Mapping[str, Any], chat: bool, message: int = 0) -> str:
    """The text that a request of the model `auto` is routed by.

    Args:
        body: of an OpenAI-compatible request.
        chat: whether it has `messages`, not a `prompt`.
        message: which of the user messages, 0 for the first, -1 for the last.

    Raises:
        NoText: there is none, or more than one prompt.

    Example:
        >>> text_of({"messages": [{"role": "user", "content": "Hello"}]}, chat=True)
        'Hello'
    """
    if chat:
        given = body.get("messages")
        messages = given if isinstance(given, list) else []
        users = [one for one in messages if isinstance(one, dict) and one.get("role") == "user"]
        if not users:
            raise NoText("messages: expected a list with a message of the role user, found none")
        content = users[message].get("content")
        if isinstance(content, list):  # parts; images and the like are passed on, but not read
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "\n".join(part for part in parts if isinstance(part, str))
    else:
        content = body.get("prompt")
        if isinstance(content, list) and len(content) == 1:
            content = content[0]
    if not isinstance(content, str) or not content:
        what = "one text; send several prompts in several requests" if isinstance(content, list) else "text"
        raise NoText(f"model {AUTO}: expected {what}, since it is routed by what it says")
    return content
