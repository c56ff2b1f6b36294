"""What a search finds, and what an update of an index has done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Hit:
    """A window in a search result."""

    path: str
    start: float
    end: float
    score: float
    window: int
    """The window's number in this index."""


@dataclass(frozen=True)
class Window:
    """A window as stored in the index."""

    number: int
    file: Path
    path: str
    """Path relative to the indexed folder."""
    start: float
    end: float


@dataclass(frozen=True)
class Changes:
    """Number of files changed by an update, and files that failed with the reason."""

    added: int
    kept: int
    removed: int
    broken: dict[str, str]
