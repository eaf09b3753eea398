"""The one error that is meant for the person at the keyboard, and what to say when memory runs out."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

# As torch, the operating system, the loader of shared libraries, Python and C++ say it.
NO_MEMORY = (
    "can't allocate memory", "out of memory", "cannot allocate memory", "failed to map segment",
    "can't start new thread", "bad_alloc",
)  # fmt: skip


class InputError(ValueError):
    """Input that a person can fix. The message says what was expected, what came, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text with control characters escaped, but for line ends and tabs: a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def escape_letters() -> None:
    """Has standard output escape letters that its encoding lacks, as standard error does."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def whole(text: str) -> bool:
    """Whether a text has no half of a character (a lone surrogate), so that it can be written in UTF-8."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def reason(error: BaseException) -> str:
    """The first line of what an error says, or else its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def out_of_memory(error: BaseException | None) -> bool:
    """Whether memory ran out, or what caused the error did: the machine's, a card's, or what a limit allows.

    Example:
        >>> out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
    """
    while error is not None:
        if isinstance(error, MemoryError) or any(words in str(error).lower() for words in NO_MEMORY):
            return True
        error = error.__cause__
    return False


@contextmanager
def explain_out_of_memory(
    less: str = "--dtype bfloat16 (half as much for weights), --apply beside (no copy of them), "
    "--batch_size 1, a smaller --max_seq_len",
) -> Iterator[None]:
    """Says which flags need less where the block fails for want of memory.

    Raises:
        InputError: it does.
    """
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise InputError(
            f"memory ran out ({reason(error):.200}); allow more than `ulimit -v` or the container does, or "
            f"pass what needs less: {less}. What was answered is kept: with more memory the same command "
            "goes on, with other flags and --fresh it starts anew"
        ) from error
