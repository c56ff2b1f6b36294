"""Tasks by name. A package adds its own through the entry-point group `emcl.tasks`; no import fills a table."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from emcl.errors import UserError

GROUP = "emcl.tasks"
EVERY_TASK = "all"


def nearest(name: str, known: list[str]) -> str:
    """', did you mean X?' for a near miss of one of `known`, else nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


def task_entries() -> dict[str, EntryPoint]:
    """Every installed task's entry point, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def expand(names: Sequence[str]) -> list[str]:
    """`all` stands for every installed task."""
    return list(task_entries()) if list(names) == [EVERY_TASK] else list(names)


def task_class(name: str) -> Any:
    """The class behind a task's name; this imports it, and PyTorch with it.

    Raises:
        UserError: no such task; names the nearest and lists all.
    """
    return task_entry(name).load()


def task_entry(name: str) -> EntryPoint:
    """A task's entry point, nothing imported.

    Raises:
        UserError: no such task; names the nearest and lists all.
    """
    entries = task_entries()
    if name not in entries:
        known = ", ".join(entries) or "none: install the package with `pip install -e .`"
        raise UserError(f"unknown task {name!r}{nearest(name, list(entries))} (tasks: {known})")
    return entries[name]
