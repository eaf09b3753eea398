"""Seconds, by the clock of torch.utils.benchmark, which waits for what runs on an accelerator.

Its `Timer` warms up with two calls at least. That would not do for runs of minutes, nor for what must find
nothing cached, so calls are made here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils.benchmark import Measurement, TaskSpec, timer

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of one call without warming up, and what it returned."""
    start = timer()
    found = work()
    return timer() - start, found


def repeated(work: Callable[[], Any], times: int) -> Measurement:
    """The seconds of so many calls, after one that warms up."""
    work()
    task = TaskSpec("work()", "", num_threads=torch.get_num_threads())
    return Measurement(1, [timed(work)[0] for _ in range(times)], task)
