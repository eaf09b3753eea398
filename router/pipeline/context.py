"""What a run has: settings, stages, processes, deadline and journal. It is passed on, and never changed."""

from __future__ import annotations

from dataclasses import dataclass, field

from router.pipeline.deadline import Deadline
from router.pipeline.journal import Journal
from router.pipeline.processes import Processes
from router.settings import Settings
from router.system.stages import Stages


@dataclass(frozen=True)
class Context:
    """What a run has.

    Attributes:
        settings: its flags.
        stages: what each of its stages costs.
        processes: those of torchrun, or this one alone.
        deadline: of a run that must end in time.
        journal: of a run that may be killed and go on.
    """

    settings: Settings = field(default_factory=Settings)
    stages: Stages = field(default_factory=Stages)
    processes: Processes = field(default_factory=Processes)
    deadline: Deadline | None = None
    journal: Journal | None = None
