"""The context of a run: settings, stages, processes, deadline, journal. It is passed on, never replaced."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from router.pipeline.journal import Journal
from router.pipeline.processes import Processes
from router.queries.submission import Query
from router.settings import Settings
from router.system.stages import Stages

RESERVE = 0.05  # share of a time limit that is kept for writing the results


class Deadline:
    """When answering ends: past it no further query is answered, so a full submission is written in time.

    Args:
        minutes: from `began` on, the time to write the results included.
        clock: seconds.
        began: by the clock; None is now.

    Attributes:
        unanswered: queries that were left out, each as often as it was asked.
    """

    def __init__(
        self, minutes: float, clock: Callable[[], float] = time.monotonic, began: float | None = None
    ) -> None:
        self._clock, self.minutes, self.unanswered = clock, minutes, list[Query]()
        self._end = (clock() if began is None else began) + 60 * minutes * (1 - RESERVE)

    def over(self) -> bool:
        """Whether no further batch may begin."""
        return self._clock() >= self._end


@dataclass(frozen=True)
class Context:
    """The context of a run."""

    settings: Settings = field(default_factory=Settings)
    stages: Stages = field(default_factory=Stages)  # what each costs
    processes: Processes = field(default_factory=Processes)  # those of torchrun, or this one alone
    deadline: Deadline | None = None  # of a run that must end in time
    journal: Journal | None = None  # of a run that may be killed and go on
