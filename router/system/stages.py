"""Seconds and peak memory of each stage of a run."""

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


def peak_gpu_mib() -> int | None:
    """The most memory that this process's tensors took on its GPUs so far, MiB; None if it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    devices = range(torch.cuda.device_count())
    return int(sum(map(torch.cuda.max_memory_allocated, devices))) >> 20


class Stages:
    """Collects and logs what stages cost. A stage that runs again adds to its seconds.

    Attributes:
        seconds: wall time by stage, in order of first use.
        peak_mib: the process's highest resident memory up to the end of each stage, MiB.
        peak_gpu_mib: the same of its tensors on GPUs; empty without one.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_mib: dict[str, int] = {}
        self.peak_gpu_mib: dict[str, int] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Measures the block as (part of) the named stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + taken
            self.peak_mib[name], on_gpu = peak_mib(), peak_gpu_mib()
            if on_gpu is not None:
                self.peak_gpu_mib[name] = on_gpu
        if taken >= TOLD:
            also = "" if on_gpu is None else f", {on_gpu} MiB on the GPU"
            log.info("%s: %.1f s, peak memory %d MiB%s", name, taken, self.peak_mib[name], also)
