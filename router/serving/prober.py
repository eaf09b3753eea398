"""Decides prompts that arrive one by one: those that wait together in one pass of the model."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from router.model.answer import halves

WINDOW = 0.005  # seconds that texts wait for more; one that waits alone does not
MOST = 64  # texts in one pass


class Prober:
    """A queue in front of one thread that decides. It belongs to the loop in which it is first called.

    Args:
        decide: one decision per text.
        limit: texts that may wait.
    """

    def __init__(self, decide: Callable[[Sequence[Any]], Sequence[Any]], limit: int) -> None:
        self.decide = decide
        self._queue: asyncio.Queue[tuple[Any, asyncio.Future[Any]]] = asyncio.Queue(limit)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="probe")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """How many texts wait."""
        return self._queue.qsize()

    async def __call__(self, text: Any) -> Any:
        """The decision on a text, or the error of `decide` on this text alone.

        Raises:
            asyncio.QueueFull: too many wait.
        """
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        future = asyncio.get_running_loop().create_future()
        self._queue.put_nowait((text, future))
        return await future

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self._queue.get()]
            await asyncio.sleep(0)  # what arrived at the same time gets into the queue
            if not self._queue.empty():
                await asyncio.sleep(WINDOW)
            while len(batch) < MOST and not self._queue.empty():
                batch.append(self._queue.get_nowait())
            batch = [(text, future) for text, future in batch if not future.cancelled()]  # clients that left
            if not batch:
                continue
            texts = [text for text, _ in batch]
            decided = await loop.run_in_executor(self._thread, self._each, texts)
            for (_, future), one in zip(batch, decided, strict=True):
                if future.done():
                    continue
                if isinstance(one, Exception):
                    future.set_exception(one)
                else:
                    future.set_result(one)

    def _each(self, texts: list[Any]) -> list[Any]:
        """A decision per text, or its error; of a batch that fails, each half is tried."""
        try:
            return [one for _, one in zip(texts, self.decide(texts), strict=True)]
        except Exception as error:
            return [error] if len(texts) == 1 else [one for half in halves(texts) for one in self._each(half)]
