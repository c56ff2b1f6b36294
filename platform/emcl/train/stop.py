"""A polite end: SIGUSR1 or SIGTERM ask a run to save and leave, as SLURM sends before a time limit or a preemption."""

from __future__ import annotations

import signal
import threading
from types import FrameType

AGAIN = 75
"""Exit status of a run that saved and wants to go on (EX_TEMPFAIL): the job script puts it into the queue again."""


class Stopped(Exception):  # noqa: N818, nothing went wrong
    """The run has saved and leaves; its text says how it goes on."""


class StopRequest:
    """Remembers that a signal came; the loop asks between steps. Nothing is done within the handler."""

    def __init__(self) -> None:
        self.asked = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
