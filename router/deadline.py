"""A run that must end in time: answers get shorter, then variants fewer, and at last queries are left out.

The order is: shorter answers first, down to FEWEST new tokens. Where even these are too slow, the base
model answers the queries of a variant that would take longer to apply than to answer with. Those of a larger
variant stay with it, since the base model would need as long and answer them worse. Past the deadline no
further query is answered, so that a full submission is always written. Multiple choice is not shortened; it
writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

RESERVE = 0.05  # share of the time that is kept for writing the results
FEWEST = 8  # new tokens; below that an answer is hardly one


class Deadline:
    """How much may still be written, by the pace so far.

    Args:
        minutes: from `began` on.
        clock: seconds.
        began: by the clock; None is now.

    Attributes:
        to_base: numbers of the queries that the base model answered in place of a variant.
        unanswered: queries that were left out.
    """

    def __init__(
        self, minutes: float, clock: Callable[[], float] = time.monotonic, began: float | None = None
    ) -> None:
        self._clock = clock
        self.minutes = minutes
        self._end = (clock() if began is None else began) + 60 * minutes * (1 - RESERVE)
        self._begun, self._total, self._done, self._work = clock(), 0, 0, 0.0
        self._variants, self._applied, self._applying = 0, 0, 0.0
        self.unanswered = 0
        self.to_base: list[int] = []

    def begin(self, tokens: int, variants: int = 0) -> None:
        """Answering begins: prompts of so many tokens, with so many variants that have to be applied."""
        self._begun, self._total, self._done, self._work = self._clock(), tokens, 0, 0.0
        self._variants, self._applied, self._applying = variants, 0, 0.0

    @contextmanager
    def applying(self) -> Iterator[None]:
        """The block applies the next variant."""
        before = self._clock()
        yield
        self._applying += self._clock() - before
        self._applied += 1

    def spares(self, tokens: int, most: int) -> bool:
        """Whether the next variant, which answers prompts of so many tokens, is better not applied.

        Args:
            most: how many new tokens an answer may have.

        Example:
            >>> now = [0.0]
            >>> deadline = Deadline(10, lambda: now[0])  # 570 seconds, less what is kept for writing
            >>> deadline.begin(1000, variants=3)
            >>> with deadline.applying():
            ...     now[0] = 100.0
            >>> now[0] = 300.0
            >>> deadline.note(200)  # 800 tokens more take 100 seconds at an eighth of the length
            >>> deadline.spares(400, 64), deadline.spares(400, 64)  # of the other two only one is in time
            (True, False)
        """
        left = self._end - self._clock()
        if left > 0 and not (self._applied and self._work):
            return False  # nothing is known yet
        if left > 0:
            apply = self._applying / self._applied
            answering = self._clock() - self._begun - self._applying
            pace = answering / self._work * min(1.0, FEWEST / most)  # seconds for a token of the prompts
            needed = apply * (self._variants - self._applied) + pace * (self._total - self._done)
            if needed <= left or apply <= pace * tokens:
                return False
        self._variants -= 1
        return True

    def note(self, tokens: int, share: float = 1.0) -> None:
        """Prompts of so many tokens have been answered, with this share of the new tokens asked for."""
        self._done += tokens
        self._work += share * tokens

    def skip(self, tokens: int) -> None:
        """Prompts of so many tokens had been answered before, which took no time now."""
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
