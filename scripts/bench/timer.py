"""Seconds, by the clock of torch.utils.benchmark, which waits for what runs on an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.utils.benchmark import timer

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of one call without warming up, and what it returned."""
    start = timer()
    found = work()
    return timer() - start, found
