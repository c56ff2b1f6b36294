"""Every setting as a Markdown table, from the dataclasses themselves: `emcl config --describe`."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from emcl import config
from emcl.registry import task_class, task_entries

HEAD = """# Every setting

Written by `emcl config --describe > docs/configuration.md`. A recipe (`configs/recipe/NAME.yaml`, `--recipe NAME` or a
path) sets them over these defaults, after the files that it `include:`s; `key=value` on the command line comes last. An
unknown key or an ill-typed value is an error that names the nearest key. `emcl config [key=value ...]` prints what a
run would use. DeepSpeed's own file (`deepspeed=`) holds ZeRO and offloading; batch size, precision and clipping are set
here alone.
"""


def describe() -> str:
    """The page, with the settings of every installed task."""
    sections = [("The run", "", config.Config)]
    sections += [
        (name, f"{name}.", type(getattr(config.Config(), name)))
        for name in ("data", "model", "emcl", "optim", "evaluate", "checkpoint", "tracking")
    ]
    sections += [(f"Task {name}", f"tasks.{name}.", task_class(name).config_class) for name in task_entries()]
    parts = [HEAD]
    for title, prefix, kind in sections:
        lines = [f"| `{prefix}{name}` | {default} | {text} |" for name, default, text in _fields(kind)]
        parts.append("\n".join([f"## {title}\n", "| key | default | |", "|---|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def _fields(kind: type) -> Iterator[tuple[str, str, str]]:
    """(name, default, docstring) of a dataclass's plain fields."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            texts[statement.target.id] = " ".join(str(after.value.value).split()) if is_text else ""  # type: ignore[union-attr]
    for field in dataclasses.fields(kind):
        default: Any = "" if field.default is dataclasses.MISSING else field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(default):
            if kind is not config.Config:  # its parts have sections of their own
                inner = _fields(type(default))
                yield from ((f"{field.name}.{name}", shown, text) for name, shown, text in inner)
        else:
            shown = "" if default is None else f"`{default}`"
            yield field.name, shown, texts[field.name].replace("|", "\\|")
