"""What the settings are, from the fields themselves: as a Markdown page and as the text of `--help`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from emcl.components import TABLES, Components
from emcl.config import Config
from emcl.errors import UserError
from emcl.inline_values import as_typed
from emcl.registry import settings_of, task_entries
from emcl.settings import fields, former_keys, former_names, subgroups, wanted
from emcl.suggestions import nearest

HEAD = """# Every setting

Written by `emcl config --describe > docs/configuration.md`. A recipe (`configs/recipe/NAME.yaml`, `--recipe NAME` or a
path) sets them over these defaults, after the files that it `include:`s; `key=value` on the command line comes last. An
unknown key or a value that its setting does not take is an error that names the nearest key or the range.
`emcl config [key=value ...]` prints what a run would use, `--help GROUP` or `--help KEY` what stands here. A text is
what was typed (`name=0012`); `null` is no value; lists are `[one, two]`, tables `{name: value}`. DeepSpeed's own file
(`deepspeed=`) holds ZeRO and offloading; batch size, precision and clipping are set here alone.
"""
RUN = "run"
"""The settings that stand in no group."""


@dataclass(frozen=True)
class Setting:
    key: str
    default: str
    """As it is typed."""
    values: str
    meaning: str


def describe() -> str:
    """The page, with the settings of every installed task."""
    sections = [HEAD]
    for name in group_names():
        kind = _kind(name)
        lines = [
            f"| `{one.key}` | `{one.default}` | {one.values} | {one.meaning.replace('|', chr(92) + '|')} |"
            for one in _settings(kind, _prefix(name))
        ]
        sections.append(
            "\n".join(
                [f"## {name}\n", f"{_summary(kind)}\n", "| key | default | values | |", "|---|---|---|---|", *lines]
            )
            + "\n"
        )
    return "\n".join(sections)


def group_names() -> list[str]:
    """`run`, `data`, ..., `tasks.retrieval`."""
    return [RUN, *subgroups(Config), *(f"tasks.{name}" for name in task_entries())]


def overview() -> str:
    """Every group with the names of its settings, for `--help`; tasks by name alone, as theirs may want PyTorch."""
    lines = ["settings, as key=value (--help GROUP and --help KEY say more, such as --help optim):"]
    for name in [RUN, *subgroups(Config)]:
        names = ", ".join(one.key.removeprefix(_prefix(name)) for one in _settings(_kind(name), _prefix(name)))
        lines.append(textwrap.fill(f"{name}: {names}", width=100, initial_indent="  ", subsequent_indent="      "))
    lines.append("  " + ", ".join(name for name in group_names() if name.startswith("tasks.")))
    return "\n".join(lines)


def explain(word: str) -> str:
    """A group's settings, or one, for `--help WORD`.

    Raises:
        UserError: neither a group nor a key.
    """
    word = word.partition("=")[0].rstrip(".")
    names = group_names()
    if word in names:
        return "\n".join([f"{word}: {_summary(_kind(word))}", *map(_paragraph, _settings(_kind(word), _prefix(word)))])
    owner = next((name for name in names if word.startswith(f"{name}.")), RUN)
    settings = list(_settings(_kind(owner), _prefix(owner)))
    matches = [one for one in settings if one.key == word or one.key.startswith(f"{word}.")]
    if not matches:
        former = former_keys(_kind(owner), _prefix(owner))
        if word in former:
            return f"  {word} is {former[word]} now:\n{explain(former[word])}"
        keys = [*names, *(one.key for one in settings)]
        raise UserError(f"--help {word}: no group and no key{nearest(word, keys)} (groups: {', '.join(names)})")
    return "\n".join([*map(_paragraph, matches), *_of_components(word)])


def _of_components(word: str) -> Iterator[str]:
    """The parts that a setting chooses among on this machine, or what is set of each in a table of options."""
    for table in TABLES:
        if word == table.setting:
            has_options = f"{word.partition('.')[2]}_options" in fields(_kind(word.partition(".")[0]))
            more = f" (--help {word}_options: what is set of each)" if has_options else ""
            yield f"      Here: {', '.join(table.names())}{more}"
        elif word == f"{table.setting}_options":
            for name in table.names():
                yield from _of_component(table, name)


def _of_component(table: Components, name: str) -> Iterator[str]:
    try:
        settings = list(_settings(table.config_class(name), f"{table.setting}_options."))
    except UserError as error:  # its package is broken, and others' are not
        yield f"  {error}"
        return
    yield f"  with {table.setting}={name}:{'' if settings else ' nothing'}"
    yield from map(_paragraph, settings)


def _paragraph(setting: Setting) -> str:
    head = f"  {setting.key}={setting.default}   ({setting.values})"
    meaning = textwrap.fill(setting.meaning, width=100, initial_indent="      ", subsequent_indent="      ")
    return f"{head}\n{meaning}" if meaning else head


def _prefix(name: str) -> str:
    return "" if name == RUN else f"{name}."


def _kind(name: str) -> Any:
    if name == RUN:
        return Config
    return settings_of(name.removeprefix("tasks.")) if name.startswith("tasks.") else subgroups(Config)[name]


def _summary(kind: Any) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _settings(kind: Any, prefix: str = "") -> Iterator[Setting]:
    """A group's own and those of the groups in it; those of Config's groups have sections of their own."""
    for name, field in fields(kind).items():
        if fields(field.annotation):
            if kind is not Config:
                yield from _settings(field.annotation, f"{prefix}{name}.")
        elif not (kind is Config and name == "tasks"):  # `--task` names them
            default = as_typed(field.get_default(call_default_factory=True))
            former = "".join(f" Formerly `{old}`." for old, new in former_names(kind).items() if new == name)
            meaning = f"{field.description or ''}{former}"
            yield Setting(f"{prefix}{name}", default, wanted(field.annotation, field.metadata), meaning)
