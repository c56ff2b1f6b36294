"""Where a step's time goes on this rank: loading, transfer, forward, backward, optimiser, and waiting for other ranks.

On a GPU the marks are CUDA events, recorded asynchronously; only `read` needs them to be complete, at a report, where
the host waits for the device anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PARTS = ("loading", "transfer", "forward", "backward", "optimizer")
"""Parts of this rank's own work; waiting for other ranks within a part is not counted there."""
WAITING = "waiting"


class StepClock:
    """Sums since the last `read`. One part is open at a time."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._waits: list[tuple[str, Any, Any]] = []
        self._loading = 0.0
        self._open: str | None = None
        self._spare: list[torch.cuda.Event] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """One of `PARTS`."""
        begin = self._mark()
        self._open = name
        try:
            yield
        finally:
            self._open = None
            self._spans.append((name, begin, self._mark()))

    @contextmanager
    def wait(self) -> Iterator[None]:
        """Times a collective within a part; outside of one it is not counted."""
        phase = self._open
        if phase is None:
            yield
            return
        begin = self._mark()
        try:
            yield
        finally:
            self._waits.append((phase, begin, self._mark()))

    def loaded(self, seconds: float) -> None:
        """Adds the seconds that the host has waited for a batch."""
        self._loading += seconds

    def read(self) -> dict[str, float]:
        """Seconds of each of `PARTS` and of `WAITING`; call it when the device is done."""
        sums = dict.fromkeys((*PARTS, WAITING), 0.0)
        sums["loading"] = self._loading
        for name, begin, end in self._spans:
            sums[name] += self._seconds(begin, end)
        for name, begin, end in self._waits:
            seconds = self._seconds(begin, end)
            sums[name] -= seconds
            sums[WAITING] += seconds
        self.restart()
        return sums

    def restart(self) -> None:
        """Discards what has not been read."""
        if self.on_gpu:
            self._spare += [mark for _, *marks in (*self._spans, *self._waits) for mark in marks]
        self._spans, self._waits, self._loading = [], [], 0.0

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self.on_gpu else end - begin
