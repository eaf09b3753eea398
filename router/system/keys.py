"""Keys of servers, from the environment: they never stand in a message, a log or a file."""

from __future__ import annotations

import os

from router.system.errors import InputError


def key_of(name: str) -> str | None:
    """The key in an environment variable, without blanks around it; None where there is none.

    Raises:
        InputError: a header cannot hold it.
    """
    found = os.environ.get(name, "").strip()
    if not (found.isascii() and found.isprintable()):
        raise InputError(f"{name}: expected a key of printable ASCII characters, got others")
    return found or None
