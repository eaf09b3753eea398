"""A run that must end in time: answers get shorter, and at last queries are left out.

Answers are cut down to FEWEST new tokens. Past the deadline no further query is answered, so that a full
submission is always written. Multiple choice is not shortened; it writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

RESERVE = 0.05  # share of the time that is kept for writing the results
FEWEST = 8  # new tokens; below that an answer is hardly one


class Deadline:
    """How much may still be written, by the pace so far.

    Args:
        minutes: from `began` on.
        clock: seconds.
        began: by the clock; None is now.

    Attributes:
        unanswered: queries that were left out.
    """

    def __init__(
        self, minutes: float, clock: Callable[[], float] = time.monotonic, began: float | None = None
    ) -> None:
        self._clock, self.minutes, self.unanswered = clock, minutes, 0
        self._end = (clock() if began is None else began) + 60 * minutes * (1 - RESERVE)
        self.begin(0)

    def begin(self, tokens: int) -> None:
        """Answering begins: prompts of so many tokens."""
        self._begun, self._total, self._done, self._work = self._clock(), tokens, 0, 0.0

    def note(self, tokens: int, share: float = 1.0) -> None:
        """Prompts of so many tokens have been answered, with this share of the new tokens asked for."""
        self._done += tokens
        self._work += share * tokens

    def skip(self, tokens: int) -> None:
        """Prompts of so many tokens need no time: they had been answered before, or are another process's."""
        self._total -= tokens

    def new_tokens(self, most: int) -> int:
        """How many new tokens an answer may have: `most`, fewer if the pace is too slow, 0 past the deadline.

        Time goes mostly into writing, so half the tokens are taken to need half the time.

        Example:
            >>> now = [0.0]
            >>> deadline = Deadline(10, lambda: now[0])  # 570 seconds, less what is kept for writing
            >>> deadline.begin(1000)
            >>> now[0] = 300.0
            >>> deadline.note(200)  # at this pace, 800 tokens more take 1200 seconds
            >>> deadline.new_tokens(64)
            14
        """
        now = self._clock()
        if now >= self._end:
            return 0
        left = self._total - self._done
        if not self._work or left <= 0:
            return most
        needed = (now - self._begun) / self._work * left  # at full length
        share = (self._end - now) / needed if needed > 0 else 1.0
        return most if share >= 1 else max(min(FEWEST, most), int(most * share))
