"""The text that a request is routed by: its prompt, or its system's and user's messages."""

from collections.abc import Mapping
from typing import Any

from router.queries.conversation import SYSTEM, Message, checked, content
from router.serving.names import AUTO
from router.system.errors import InputError


def prompt_of(body: Mapping[str, Any]) -> str | list[Message]:
    """The prompt or conversation that a request of the model `auto` is routed by.

    Args:
        body: of a request: `prompt`, as OpenAI's completions have it; `messages`, as OpenAI's chats and
            Anthropic's messages (with `system`); or `input`, as OpenAI's responses (with `instructions`).

    Raises:
        InputError: there is no text, or more than one prompt.

    Example:
        >>> prompt_of({"input": "Hello", "instructions": "Be brief."})
        [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hello'}]
    """
    messages, where = body.get("messages"), "messages"
    if messages is None:
        messages, where = body.get("input"), "input"
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    if messages is None:
        given = body.get("prompt")
        if isinstance(given, list) and len(given) == 1:
            given = given[0]
        if not isinstance(given, str) or not given:
            what = "one text; send several prompts in several requests" if isinstance(given, list) else "text"
            raise InputError(f"model {AUTO}: expected {what}, since it is routed by what it says")
        return given
    above = content({"content": body.get("system") or body.get("instructions")})
    if isinstance(messages, list):  # a response's input has tools, their calls and results, too
        messages = [
            one for one in messages if not isinstance(one, Mapping) or one.get("type") in (None, "message")
        ]
    if messages == []:
        raise InputError(f"{where}: expected a message of the user with text, since it is routed by it")
    sound = checked(messages, where, ends=False)
    sound = [{"role": "system", "content": above}, *sound] if above else sound
    system = [one for one in sound if one["role"] in SYSTEM]
    asked = [one for one in sound if one["role"] == "user" and content(one).strip()]
    return [{"role": one["role"], "content": content(one)} for one in (*system, *asked)]
