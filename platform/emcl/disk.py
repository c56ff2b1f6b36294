"""Files that others read while they are written, on disks that fill up, by processes that are killed in between."""

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
    """Beside its place, then renamed: whoever reads it, or kills this process, finds the old text or the new."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")  # several processes may write at once
    try:
        part.write_text(text)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def aside(path: Path) -> Path:
    """Where what stood at `path` waits until what replaces it stands."""
    return path.with_name(f".{path.name}{OLD}")


def replace_folder(new: Path, path: Path) -> None:
    """Gives a whole folder its name. What had the name before goes last, and is at `aside(path)` until then."""
    old = aside(path)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def in_turn(lock: Path, *, without_locks: bool = False) -> Iterator[None]:
    """Processes that do the same thing do it one after another; `lock` is a file for that alone.

    Args:
        without_locks: whether it is done all the same on a file system without locks, as a cluster's may be.

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
    """In words, what keeps a file or a folder from being made at `path`; nothing is made."""
    nearest = _nearest(path)
    if nearest != path and not os.path.isdir(nearest):  # noqa: PTH112, which raises where a folder is not to be read
        return f"{nearest} is a file"
    return None if os.access(nearest, os.W_OK) else f"{nearest} may not be written to"


def free_bytes(path: Path) -> int:
    """Of the disk that `path` lies on, or would lie on."""
    return shutil.disk_usage(_nearest(path)).free


def _nearest(path: Path) -> Path:
    """`path`, or the first around it that is there."""
    return next(one for one in (path, *path.absolute().parents) if os.path.lexists(one))
