"""A run that must end in time: past the deadline no further query is answered.

So a full submission is always written, in which what was left out says `unknown`.
"""

import time
from collections.abc import Callable

RESERVE = 0.05  # share of the time that is kept for writing the results


class Deadline:
    """When answering ends.

    Args:
        minutes: from `began` on, the time to write the results included.
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

    def over(self) -> bool:
        """Whether no further batch may begin."""
        return self._clock() >= self._end
