"""Seconds and peak memory of each stage of a run."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

TOLD = 1.0  # seconds; a stage that takes at least this long is logged
log = logging.getLogger(__name__)


def peak_mib() -> int:
    """The process's highest resident memory so far, MiB."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset) >> 20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (1 << 20 if sys.platform == "darwin" else 1 << 10)


class Stages:
    """Collects and logs what stages cost. A stage that runs again adds to its seconds.

    Attributes:
        seconds: wall time by stage, in order of first use.
        peak_mib: the process's highest resident memory up to the end of each stage, MiB.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures the block as (part of) the named stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + taken
            self.peak_mib[name] = peak_mib()
        if taken >= TOLD:
            log.info("%s: %.1f s, peak memory %d MiB", name, taken, self.peak_mib[name])
