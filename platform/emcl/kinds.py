"""Further names of tasks: `kinds.short=captioning` makes `short` a second captioning task beside the first.

They are read before all other settings, since they say which settings a task has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from emcl.errors import UserError
from emcl.recipe import Overrides, filled_in
from emcl.registry import EVERY_TASK, task_entries, task_entry, unknown_task
from emcl.settings import NOTHING, Tree, build, group, merge, nested

Kinds = Mapping[str, str]
"""By further name, the task's own."""
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}")


@group
class _Table:
    kinds: dict[str, str] = Field(default_factory=dict)


def kinds_in(layers: Sequence[Tree], given: Overrides = ()) -> dict[str, str]:
    """The further names that trees of settings and then `key=value` overrides give.

    Those of a file join those of the files that it includes, as the settings of tasks do.

    Raises:
        UserError: one is no name, or stands for no task.
    """
    tree: Tree = {"kinds": {}}
    for layer in layers:
        tree = {"kinds": {**tree["kinds"], **_table(layer.get("kinds"))}}
    for key, text in given:
        if key == "kinds":
            tree = {"kinds": _table(text)}
        elif key.startswith("kinds."):
            merge(_Table, tree, nested(_Table, key, text))
    kinds = {name: filled_in(f"kinds.{name}", kind) for name, kind in build(_Table, tree).kinds.items()}
    for name, kind in kinds.items():
        if not _may_be_named(name):
            rule = "a letter, then up to 63 letters, digits, - and _; not `all`"
            raise UserError(f"kinds.{name}={kind}: {name!r} is no name for a task ({rule})")
        try:
            task_entry(kind)
        except UserError as error:
            raise UserError(f"kinds.{name}={kind}: {error}") from None
    return kinds


def _table(given: Any) -> dict[str, str]:
    """What stands for no value is a table with nothing in it."""
    empty = given is None or (isinstance(given, str) and given in NOTHING)
    return {} if empty else build(_Table, {"kinds": given}).kinds


def check_new(kinds: Kinds) -> None:
    """Raises UserError: a name is a task's own. A run that has it already keeps it, whatever is installed later."""
    installed = task_entries()
    for name, kind in kinds.items():
        if name in installed:
            raise UserError(f"kinds.{name}={kind}: {name} is a task already; a further name must be new")


def check_known(name: str, kinds: Kinds, *, may_be_further: bool = True) -> None:
    """Raises UserError: no task has the name; tells the nearest, and how it may become a further name of one."""
    known = [*task_entries(), *kinds]
    if name not in known:
        hint = f"; a further name of one: kinds.{name}=TASK" if may_be_further and _may_be_named(name) else ""
        raise unknown_task(name, known, hint)


def _may_be_named(name: str) -> bool:
    return bool(_NAME.fullmatch(name)) and name != EVERY_TASK
