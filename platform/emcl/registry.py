"""Tasks by name. A package adds its own through the entry-point group `emcl.tasks`; no import fills a table."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import Any

from emcl.components import DISTRIBUTION, load_entry
from emcl.errors import UserError
from emcl.installed import entry_points
from emcl.settings import as_group
from emcl.suggestions import nearest

GROUP = "emcl.tasks"
SETTINGS = "emcl.settings"
EVERY_TASK = "all"
"""Stands for every installed task, and every further name of one that a run has."""


def task_entries() -> dict[str, EntryPoint]:
    """Every installed task's entry point, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name)}


def task_class(name: str) -> Any:
    """The class behind a task's name; this imports it, and PyTorch with it.

    Raises:
        UserError: no such task; names the nearest and lists all.
    """
    return load_entry(task_entry(name), f"task {name}")


def task_entry(name: str) -> EntryPoint:
    """A task's entry point, nothing imported.

    Raises:
        UserError: no such task; names the nearest and lists all.
    """
    entries = task_entries()
    if name not in entries:
        raise unknown_task(name, list(entries))
    return entries[name]


def unknown_task(name: str, known: Sequence[str], hint: str = "") -> UserError:
    """What is said where a task has none of the names that are known."""
    listed = ", ".join(known) or "none: install the package with `pip install -e .`"
    return UserError(f"unknown task {name!r}{nearest(name, known)} (tasks: {listed}{hint})")


def is_built_in(name: str) -> bool:
    """Whether it is this package that has registered the name."""
    entry = task_entries().get(name)
    return entry is not None and entry.dist is not None and entry.dist.name == DISTRIBUTION


def settings_of(name: str) -> Any:
    """The class of a task's settings, wherever it is; that may import PyTorch.

    Raises:
        UserError: no such task; names the nearest and lists all.
    """
    return early_settings_of(name) or as_group(task_class(name).config_class)


def early_settings_of(name: str) -> Any | None:
    """The class of a task's settings, from the entry-point group `emcl.settings`: modules without PyTorch.

    None where the task's package names none there; then they are checked once the task is imported.

    Raises:
        UserError: no such task; names the nearest and lists all.
    """
    package = task_entry(name).dist
    for entry in entry_points(group=SETTINGS, name=name):
        if entry.dist and package and entry.dist.name == package.name:
            return as_group(load_entry(entry, f"task {name}"))
    return None
