"""Loads the batches that come next while the model works on this one."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

AHEAD = 2  # batches
Batch = TypeVar("Batch")


class Prefetch(Generic[Batch]):
    """Calls `load(number)` for coming micro-batches in threads; what a batch holds depends on its number alone."""

    def __init__(self, load: Callable[[int], Batch], n_threads: int = 2) -> None:
        self._load = load
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="prefetch")
        self._futures: dict[int, Future[Batch]] = {}

    def __call__(self, number: int) -> Batch:
        """The batch of micro-batch `number`; an error in loading it is raised here."""
        for coming in range(number, number + 1 + AHEAD):
            if coming not in self._futures:
                self._futures[coming] = self._pool.submit(self._load, coming)
        batch = self._futures.pop(number).result()
        for stale in [n for n in self._futures if n < number]:
            self._futures.pop(stale).cancel()
        return batch
