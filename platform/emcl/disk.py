"""Atomic writes: for files with concurrent readers, full disks, and processes that are killed in between."""

from __future__ import annotations

import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OLD = ".old"


def write_whole(path: Path, text: str) -> None:
    """Writes a temporary file, then renames it: there is always either the old text or the new."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")  # several processes may write at once
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def aside(path: Path) -> Path:
    """Where the old content of `path` is kept until its replacement is complete."""
    return path.with_name(f".{path.name}{OLD}")


def replace_folder(new: Path, path: Path) -> None:
    """Renames a complete folder to `path`. A folder there before is kept at `aside(path)`, and deleted last."""
    old = aside(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def in_turn(lock: Path, *, without_locks: bool = False) -> Iterator[None]:
    """A lock between processes: they run the block one after another. The file `lock` serves this alone.

    Args:
        without_locks: whether the block runs even on a file system without locks, as a cluster's may be.

    Raises:
        OSError: there are no locks here.
    """
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            if not without_locks:
                raise
        yield


def why_not_written(path: Path) -> str | None:
    """Describes why no file or folder can be created at `path`; None if it can. Creates nothing."""
    nearest = _nearest(path)
    if nearest != path and not os.path.isdir(nearest):  # noqa: PTH112, which raises where a folder is not to be read
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK) else f"{nearest} may not be written to"


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that `path` lies on, or would lie on."""
    return shutil.disk_usage(_nearest(path)).free


def _nearest(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    return next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
