"""Runs work ahead while its results are used, with a bounded number of results in memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_order(futures: Iterable[Future[Result]], ahead: int) -> Iterator[Result]:
    """Results in the order of their submission, while up to `ahead` more are in progress."""
    waiting: deque[Future[Result]] = deque()
    try:
        for future in futures:
            waiting.append(future)
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
