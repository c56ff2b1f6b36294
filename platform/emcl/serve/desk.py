"""A line of bounded length before threads that do one thing after the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class BusyError(Exception):
    """The line is full."""


class Desk:
    """The model is not thread-safe and memory is finite: one works, so many wait, the rest come back later."""

    def __init__(self, name: str, *, threads: int, waiting: int) -> None:
        self.limit, self.here = waiting + threads, 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)

    async def do(
        self, work: Callable[Arguments, Result], *arguments: Arguments.args, **named: Arguments.kwargs
    ) -> Result:
        """Raises BusyError where the line is full."""
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
