"""The one error that is meant for the person at the keyboard."""

from __future__ import annotations


class InputError(ValueError):
    """Input that a person can fix. The message says what was expected, what came, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text with control characters escaped, but for line ends and tabs: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


class ServerError(InputError):
    """A server that answers queries has failed. The same command goes on where it was."""
