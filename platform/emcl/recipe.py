"""Recipe files and `key=value` overrides, as trees of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from emcl.errors import UserError, first_line
from emcl.resources import find_file
from emcl.settings import Tree

Overrides = Sequence[tuple[str, str]]
"""Keys and their text."""


class _AsWritten(yaml.SafeLoader):
    """Scalars stay text, `0012` and `on` too; a key that stands twice in one place is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value if key.value != "<<"]
        twice = next((key for index, key in enumerate(keys) if key in keys[:index]), None)
        if twice is not None:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice!r} stands twice in one group")
        return node


_AsWritten.yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}  # `<<: *anchor` alone


def as_written(text: str) -> Any:
    """YAML, every value as it is written there.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: it is none, or holds itself.
    """
    content = yaml.load(text, _AsWritten)
    json.dumps(content)  # raises where an anchor lies within itself
    return content


def read_yaml(path: Path) -> Tree:
    """A file's settings, every value as it is written there.

    Raises:
        UserError: it is no YAML, or holds no `key: value`.
    """
    try:
        content = as_written(path.read_text())
    except (yaml.YAMLError, ValueError, OSError, RecursionError, TypeError) as error:
        where = getattr(error, "problem_mark", None)  # yaml's errors span several lines
        reason = f"line {where.line + 1}: {error.problem}" if where else first_line(error)  # type: ignore[union-attr]
        raise UserError(f"{path} is not readable YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no `key: value` settings")
    return content


def read_recipe(path: Path, includers: Sequence[Path] = ()) -> list[Tree]:
    """A file's settings, after those of the files that it includes.

    Raises:
        UserError: it is no YAML, or includes itself or what is no file.
    """
    if path in includers:
        raise UserError(f"{path} includes itself, by way of {includers[-1]}")
    content = read_yaml(path)
    included = content.pop("include", "") or []
    names = [included] if isinstance(included, str) else included
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{path}: include={included} is not a list [one, two] of files of configs/")
    files = [find_file(name, name.partition("/")[0]) for name in names]
    return [*(layer for file in files for layer in read_recipe(file, [*includers, path])), content]


def filled_in(key: str, text: str) -> str:
    """A setting as it is typed, with `${oc.env:...}` replaced.

    Raises:
        UserError: there is no such variable.
    """
    if "${" not in text:
        return text
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return str(OmegaConf.create({"text": text})["text"])
    except OmegaConfBaseException as error:
        raise UserError(f"{key}={text}: {first_line(error)}") from None


def parse_overrides(overrides: Iterable[str]) -> Overrides:
    """Keys and their text.

    Raises:
        UserError: one is not `key=value`.
    """
    pairs = []
    for item in overrides:
        key, equals, text = item.partition("=")
        if not (key and equals) or item.startswith("-"):
            raise UserError(
                f"override {item!r} is not key=value, such as optim.lr=1e-4 (options start with --, see --help)"
            )
        pairs.append((key, text))
    return pairs
