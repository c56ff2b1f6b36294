"""One process per run: a second one in the same folder would overwrite the first one's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from emcl.errors import UserError


class InUseError(UserError):
    """Another process holds the run."""


class RunLock:
    """Held until `release` or until the process ends, however it ends.

    Raises:
        InUseError: another process holds it; says which.
        OSError: its file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        """`path` is the lock's own file."""
        self.path = path
        self._file = self._taken()
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def _taken(self) -> TextIO:
        while True:
            file = self.path.open("a+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    who = file.read().strip() or "another process"
                folder = self.path.parent
                raise InUseError(f"{folder} is in use by {who}: give another name=, or wait for its end") from None
            except OSError:
                return file  # a file system without locks: a cluster's may have none
            if self._stands(file):
                return file
            file.close()  # its holder has just removed it

    def _stands(self, file: TextIO) -> bool:
        try:
            return os.path.samestat(self.path.stat(), os.fstat(file.fileno()))
        except FileNotFoundError:
            return False

    def release(self, *, remove: bool = False) -> None:
        """Releases it; with `remove`, its file is deleted, too."""
        if remove:
            self.path.unlink(missing_ok=True)
        self._file.close()
