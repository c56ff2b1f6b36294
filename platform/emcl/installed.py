"""Entry points of installed packages; read once, since one search takes 10 ms and settings ask for many."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import metadata
from pathlib import Path


def entry_points(*, group: str, name: str | None = None) -> metadata.EntryPoints:
    """Those of a group (of one name), as `importlib.metadata.entry_points`."""
    found = _all(tuple((folder, _changed(folder)) for folder in sys.path))
    return found.select(group=group) if name is None else found.select(group=group, name=name)


@lru_cache(maxsize=1)
def _all(folders: tuple[tuple[str, float], ...]) -> metadata.EntryPoints:
    """Those of all packages, searched anew where a folder of `sys.path` has changed, as by an installation."""
    return metadata.entry_points()  # type: ignore[return-value]  # SelectableGroups only before Python 3.12


def _changed(folder: str) -> float:
    try:
        return Path(folder).stat().st_mtime
    except OSError:
        return 0.0
