"""Graceful stop: at SIGUSR1 or SIGTERM, which SLURM sends before a time limit or preemption, a run saves and exits."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

AGAIN = 75
"""Exit status of a run that saved and is to be continued (EX_TEMPFAIL): the job script requeues it."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)


class Stopped(Exception):  # noqa: N818, nothing went wrong
    """The run has saved and exits; the message says how to resume it."""


class StopRequest:
    """Context manager that records a signal; the training loop checks it between steps. A second SIGTERM kills."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = True
