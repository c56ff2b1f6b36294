"""Sends messages in order from a background thread, retrying each while the server does not answer."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from emcl.errors import first_line

PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second try, doubled each time up to the longest."""


@dataclass(frozen=True)
class Message:
    send: Callable[[bool], object]
    """Called with whether it was tried before: the message may have arrived although the answer did not."""
    content: Any = None
    """What is kept of it if it is never sent."""


class AsyncSender:
    """Args:
    refused: whether an error is permanent; that message is dropped.
    said: called with one line when the server stops answering and when it answers again.
    """

    def __init__(self, refused: Callable[[Exception], bool], said: Callable[[str], None]) -> None:
        self._refused, self._say = refused, said
        self._waiting: deque[Message] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="async sender", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        with self._changed:
            self._waiting.append(message)
            self._changed.notify_all()

    def close(self, seconds: float) -> list[Any]:
        """Waits until all is sent, at most so many seconds; returns the contents of unsent messages."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        with self._changed:
            left = [message.content for message in self._waiting if message.content is not None]
            self._waiting.clear()
            self._changed.notify_all()
        return left

    def _work(self) -> None:
        tries = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                message = self._waiting[0]
            try:
                message.send(tries > 0)
            except Exception as error:
                if not self._refused(error):
                    tries += 1
                    if tries == 1:
                        self._say(f"does not answer ({first_line(error)}); what is recorded is kept and sent later")
                    self._rest(min(LONGEST_PAUSE, PAUSE * 2 ** (tries - 1)))
                    continue
                self._say(f"refused a record: {first_line(error)}")
            else:
                if tries:
                    self._say(f"answers again, after {tries} tries")
            tries = 0
            with self._changed:
                if self._waiting and self._waiting[0] is message:
                    self._waiting.popleft()

    def _rest(self, seconds: float) -> None:
        """Sleeps so long, or until the queue is emptied."""
        until = time.monotonic() + seconds
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout=max(0.0, until - time.monotonic()))
