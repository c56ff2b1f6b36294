"""One run a folder: a second one with the same name would write over its checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from emcl.errors import UserError

LOCK = ".lock"


class RunLock:
    """Held as long as this object lives, and by no process that has ended, however it did.

    Raises:
        UserError: another run holds it; says which.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / LOCK).open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.seek(0)
            who = self._file.read().strip() or "another process"
            raise UserError(f"{folder} is in use by {who}: give another name=, or wait for its end") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()
