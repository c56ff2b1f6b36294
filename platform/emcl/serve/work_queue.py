"""A bounded queue of work for a fixed number of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class BusyError(Exception):
    """The queue is full."""


class WorkQueue:
    """Runs work in `threads` threads; at most `waiting` calls wait, further ones are rejected.

    The model needs this because it is not thread-safe (one thread) and memory is finite."""

    def __init__(self, name: str, *, threads: int, waiting: int) -> None:
        self.limit, self.here = waiting + threads, 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def run(
        self, work: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result:
        """Runs `work` in a thread. Raises BusyError if the queue is full."""
        if self.here >= self.limit:
            raise BusyError
        self.here += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: work(*arguments, **named))
        finally:
            self.here -= 1

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
