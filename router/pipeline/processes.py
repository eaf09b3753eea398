"""The processes of one run, which torchrun starts: who takes which batches, and what all of them know.

accelerate's state connects them. A run without torchrun is the case of one process, for which nothing is
imported. Knows no models and no queries.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from router.system.errors import InputError, reason

PATIENCE = timedelta(days=7)  # one process may wait long for another; torchrun ends those of one that died
T = TypeVar("T")


class Ended(KeyboardInterrupt):
    """Another process of the run has ended, so this one stops as if it had been told to."""


def several() -> bool:
    """Whether torchrun started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "") not in ("", "1")


def leads() -> bool:
    """Whether this is the process that writes the results and tells how the run goes on."""
    return not several() or os.environ.get("RANK", "0") == "0"


class Processes:
    """The processes of a run, as one of them sees them. All of them must call the same in the same order.

    Args:
        rank: of this process, from 0; the first one decides and writes.
        count: of all of them.
    """

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count
        self._loads = [0] * count  # tokens that each process has taken

    def takes(self, tokens: int) -> bool:
        """Whether the next batch is this process's: it goes to the one with the fewest tokens so far.

        Example:
            >>> second = Processes(1, 2)
            >>> [second.takes(tokens) for tokens in (9, 5, 3, 2)]
            [False, True, True, True]
        """
        owner = self._loads.index(min(self._loads))
        self._loads[owner] += tokens
        return owner == self.rank

    def gathered(self, value: T) -> list[T]:
        """Each process's value, in order of rank."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        with _together():
            values: list[T] = gather_object([value])
        return values

    def decided(self, decide: Callable[[], T]) -> T:
        """The first process's decision; the others wait for it and do not call `decide`."""
        decision = [None if self.rank else decide()]
        if self.count > 1:
            from accelerate.utils import broadcast_object_list

            with _together():
                broadcast_object_list(decision)
        return decision[0]  # type: ignore[return-value]

    @contextmanager
    def first(self) -> Iterator[None]:
        """Lets the first process run the block before the others do, who find on disk what it left there."""
        if self.rank:
            self.decided(lambda: None)
        yield
        if not self.rank:
            self.decided(lambda: None)


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise Ended(f"another process of the run has ended ({reason(error)})") from error


@contextmanager
def connected(device: str) -> Iterator[Processes]:
    """Connects this process with the others of its run while the block runs.

    Args:
        device: `auto`, `cpu` or `cuda`; on `cuda` each process takes the card of its number on its machine.

    Raises:
        InputError: they cannot be connected, or are more than there are cards.
    """
    if not several():
        yield Processes()
        return
    import torch

    from router.model.device import pick_device

    size = os.environ["WORLD_SIZE"]
    needed = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise InputError(
            f"WORLD_SIZE={size}: expected torchrun, which sets {', '.join(missing)} too; start the run with "
            "torchrun, or unset WORLD_SIZE"
        )
    cpu = pick_device(device) == "cpu"
    cards = torch.cuda.device_count()
    if not cpu and int(os.environ["LOCAL_RANK"]) >= cards:
        raise InputError(
            f"WORLD_SIZE={size}: expected at most one process for each card of a machine, but here are "
            f"{cards}; pass --nproc_per_node {cards} to torchrun"
        )
    from accelerate import PartialState

    try:
        state = PartialState(cpu=cpu, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"WORLD_SIZE={size}: the processes cannot be connected: {error}") from error
    try:
        yield Processes(state.process_index, state.num_processes)
    finally:
        state.destroy_process_group()
