"""Values as one types them on one line: `[one, two]`, `{name: value}`, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from emcl.errors import UserError

LONGEST_SHOWN = 200
"""Characters of a value that an error shows."""


def parse_list(text: str) -> Any:
    """`[one, two]`; any other text as it is."""
    try:
        several = yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return text
    return several if isinstance(several, list) else text


def parse_table(text: str) -> Any:
    """`{name: value, ...}`, whose names may be patterns of shards: with braces, colons and dots in them."""
    inside = text.strip()
    if not (inside.startswith("{") and inside.endswith("}")):
        return text
    entries: dict[str, Any] = {}
    for entry in _split(inside[1:-1]):
        cut = _colon(entry)
        if cut < 0:
            return text
        name = _bare(entry[:cut])
        if not name:
            return text
        if name in entries:
            raise UserError(f"{name} stands twice in {shown(text)}")
        entries[name] = _bare(entry[cut + 1 :])
    return entries


def _depths(text: str) -> Iterator[tuple[int, str, int]]:
    """(index, character, brackets around it) of what is outside quotes, which open where a name or value does."""
    depth, quote, last = 0, "", ","
    for index, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
            continue
        if character in "'\"" and last in ",:{[":
            quote = character
        elif character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        last = last if character.isspace() else character
        yield index, character, depth


def _split(text: str) -> list[str]:
    """At the commas that no bracket holds."""
    cuts = [index for index, character, depth in _depths(text) if character == "," and not depth]
    entries = [text[start + 1 : end] for start, end in zip([-1, *cuts], [*cuts, len(text)], strict=True)]
    return [entry for entry in entries if entry.strip()]


def _colon(entry: str) -> int:
    """Where an entry's value begins: its colon before a space, or its last one; -1 without one, or with several."""
    colons = [index for index, character, depth in _depths(entry) if character == ":" and not depth]
    spaced = [index for index in colons if entry[index + 1 : index + 2].isspace()]
    return -1 if len(spaced) > 1 else (spaced or colons or [-1])[-1]


def _bare(text: str) -> str:
    """Without spaces and quotes around it."""
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


def as_typed(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {as_typed(one)}' for name, one in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(as_typed, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def shown(value: Any) -> str:
    """A value as an error shows it: cut where it is long."""
    text = as_typed(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
