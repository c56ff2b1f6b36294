"""Tasks by name. A package adds its own through the entry-point group `emcl.tasks`; no import fills a table."""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
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


def settings_class(name: str) -> Any | None:
    """The class of a task's settings, made from its file's text: the file itself imports PyTorch, which takes seconds.

    None where it cannot be made so. The class is a twin of the task's own, good for checking values early.

    Raises:
        UserError: no such task; names the nearest and lists all.
    """
    entry = task_entry(name)
    try:
        spec = find_spec(entry.module)
        assert spec and spec.origin
        body = ast.parse(Path(spec.origin).read_text()).body
        task = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == entry.attr)
        (settings,) = [node for node in task.body if isinstance(node, ast.Assign) and "config_class" in _bound(node)]
        assert isinstance(settings.value, ast.Name)
        name = settings.value.id
        module = sys.modules[f"{entry.module} (settings)"] = ModuleType(f"{entry.module} (settings)")
        exec(compile(ast.Module(_needed(body, name), []), spec.origin, "exec"), module.__dict__)
        return getattr(module, name)
    except Exception:  # it is somebody's file, and may do as it likes: then its settings are checked with the task
        return None


def _needed(body: list[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements of a module that bind `name`, and the names that those use, in order."""
    names, found = [name, "annotations"], set()
    for wanted in names:  # grows meanwhile
        for statement in body:
            if statement not in found and wanted in _bound(statement):
                found.add(statement)
                names += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return [statement for statement in body if statement in found]


def _bound(statement: ast.stmt) -> set[str]:
    """The names that it binds."""
    if isinstance(statement, ast.ImportFrom | ast.Import):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return {statement.name}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        return {target.id for target in targets if isinstance(target, ast.Name)}
    return set()
