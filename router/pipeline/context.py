"""What a run has: settings, stages, processes, deadline and journal. It is passed on, never replaced."""

from dataclasses import dataclass, field

from router.pipeline.deadline import Deadline
from router.pipeline.journal import Journal
from router.pipeline.processes import Processes
from router.settings import Settings
from router.system.stages import Stages


@dataclass(frozen=True)
class Context:
    """What a run has."""

    settings: Settings = field(default_factory=Settings)
    stages: Stages = field(default_factory=Stages)  # what each costs
    processes: Processes = field(default_factory=Processes)  # those of torchrun, or this one alone
    deadline: Deadline | None = None  # of a run that must end in time
    journal: Journal | None = None  # of a run that may be killed and go on
