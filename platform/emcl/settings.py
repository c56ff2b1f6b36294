"""Groups of settings: what they hold, how text becomes their values, and what is said of a wrong one.

A group is a frozen dataclass whose fields say type, range and meaning; pydantic checks them whenever one is made, also
by `dataclasses.replace`:

    @group
    class OptimConfig:
        lr: float = Field(1e-4, gt=0, description="For the new modules.")

Files and the command line are read as text, and each field takes its own: a string is what was typed, be it `0012`,
`12:30` or `on`.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import EnumType
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal, TypeVar, Union, dataclass_transform, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic import dataclasses as pydantic_dataclasses
from pydantic.fields import FieldInfo

from emcl.errors import UserError, first_line
from emcl.inline_values import parse_list, parse_table, shown
from emcl.suggestions import nearest

Group = TypeVar("Group", bound=type)
Tree = dict[str, Any]
"""Settings by name: text, lists of text, or trees of them; values that are no text are taken as they are."""
NOTHING = ("null", "Null", "NULL", "None", "~", "")
"""What stands for no value, where a setting may have none."""
_CHECKS = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Unit:
    """What a number counts: `Annotated[float, Unit("seconds")]`."""

    name: str


@dataclass(frozen=True)
class Formerly:
    """A name that a setting had: `max_tokens: Annotated[int, Formerly("words")]`. It works for one release more.

    What a run or an export has kept under it is read for good.
    """

    name: str


Clips = Annotated[int, Unit("clips")]
Epochs = Annotated[int, Unit("epochs")]
Frames = Annotated[int, Unit("frames")]
GiB = Annotated[float, Unit("GiB")]
Pixels = Annotated[int, Unit("pixels")]
Seconds = Annotated[float, Unit("seconds")]
Steps = Annotated[int, Unit("steps")]
Tokens = Annotated[int, Unit("tokens")]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def group(kind: Group) -> Group:
    """Makes a class with annotated fields a group of settings."""
    return _readable(pydantic_dataclasses.dataclass(frozen=True, kw_only=True, config=_CHECKS)(kind))


@cache
def as_group(kind: Any) -> Any:
    """A plain dataclass, such as another package's task may bring, as a group.

    Raises:
        TypeError: it extends a group, and is none itself.
    """
    if fields(kind):
        return kind
    if hasattr(kind, "__pydantic_fields__"):
        raise TypeError(f"{kind.__qualname__} extends a group of settings: make it one by `@group` (emcl.settings)")
    return _readable(pydantic_dataclasses.dataclass(kind, frozen=kind.__dataclass_params__.frozen, config=_CHECKS))


def _readable(kind: Any) -> Any:
    """The group with its settings under their former names besides, as others' code reads them."""
    for former, name in former_names(kind).items():
        setattr(kind, former, property(attrgetter(name)))
    return kind


def fields(kind: Any) -> dict[str, FieldInfo]:
    """A group's, by name; none of anything else, a plain dataclass that extends a group too."""
    return vars(kind).get("__pydantic_fields__", {}) if isinstance(kind, type) else {}


def former_names(kind: Any) -> dict[str, str]:
    """A group's settings that had another name: the new one by the old."""
    return {
        former.name: name
        for name, field in fields(kind).items()
        for former in field.metadata
        if isinstance(former, Formerly)
    }


def former_keys(kind: Any, prefix: str = "") -> dict[str, str]:
    """Former keys of settings in a group and the groups within it, such as `data.words`, with the new ones."""
    keys = {f"{prefix}{former}": f"{prefix}{name}" for former, name in former_names(kind).items()}
    for name, group_within in subgroups(kind).items():
        keys |= former_keys(group_within, f"{prefix}{name}.")
    return keys


def subgroups(kind: Any) -> Mapping[str, Any]:
    """The groups within a group, or within a table of groups by name."""
    if isinstance(kind, Mapping):
        return kind
    return {name: field.annotation for name, field in fields(kind).items() if fields(field.annotation)}


def merge(kind: Any, base: Tree, layer: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Puts `layer` over `base`: groups are joined, and any other value takes the place of the one before.

    Returns:
        The keys in `layer` that are former names of settings, each with the new one, which `base` gets instead.

    Raises:
        UserError: something else than settings where a group stands, or a setting under both of its names.
    """
    if isinstance(layer, str):
        layer = parse_table(layer) if layer else {}  # a file may name a group and set nothing in it
    if not isinstance(layer, Mapping):
        raise UserError(f"{prefix.rstrip('.')}={shown(layer)} is no group of settings ({_known(kind)})")
    within, former, met = subgroups(kind), former_names(kind), list[tuple[str, str]]()
    for given, value in layer.items():
        name: Any = former.get(given, given)
        if name != given:
            if name in layer:
                raise UserError(f"{prefix}{given} is {prefix}{name} now: give it once")
            met.append((f"{prefix}{given}", f"{prefix}{name}"))
        if name in within:
            met += merge(within[name], base.setdefault(name, {}), value, f"{prefix}{name}.")
        elif isinstance(value, _Entry):
            base[name] = {**_table(base.get(name), f"{prefix}{name}"), **value}
        else:
            base[name] = value
    return met


def _table(before: Any, key: str) -> Mapping[str, Any]:
    """What a setting that is a table holds so far."""
    table = parse_table(before) if isinstance(before, str) else before
    if isinstance(table, Mapping):
        return table
    if before is None or before in NOTHING:
        return {}
    raise UserError(f"{key}={shown(before)} is not a table {{name: value}}")


class _Entry(dict[str, str]):
    """One entry of a setting that is a table, which keeps its others."""


def nested(kind: Any, key: str, text: str) -> Tree:
    """`a.b` and its text as a tree; within a setting that is a table, all that follows its name is one key."""
    name, dot, rest = key.partition(".")
    within = subgroups(kind)
    if not dot or not (rest or name in within):
        return {key: text}
    return {name: nested(within[name], rest, text) if name in within else _Entry({rest: text})}


def build(kind: Any, tree: Tree, prefix: str = "") -> Any:
    """The group that a tree describes.

    Raises:
        UserError: the first key that it lacks, or value that it does not take, with the range.
    """
    shaped = _shaped(kind, tree)
    try:
        return TypeAdapter(kind).validate_python(shaped)
    except ValidationError as error:
        raise UserError(_explained(kind, shaped, error, prefix)) from None


def _shaped(annotation: Any, value: Any) -> Any:
    """`value` with its text taken apart where `annotation` wants several values, or may have none."""
    inner, _, optional = _type(annotation)
    if isinstance(value, str) and optional and value in NOTHING:
        return None
    if fields(inner):
        value = parse_table(value) if isinstance(value, str) else value
        if not isinstance(value, Mapping):
            return value
        known = fields(inner)
        return {name: _shaped(known[name].annotation, one) if name in known else one for name, one in value.items()}
    origin, arguments = get_origin(inner), get_args(inner)
    if origin in _SEVERAL:
        value = parse_list(value) if isinstance(value, str) else value
        return [_shaped(arguments[0], one) for one in value] if isinstance(value, list) else value
    if origin is dict:
        value = parse_table(value) if isinstance(value, str) else value
        return (
            {name: _shaped(arguments[1], one) for name, one in value.items()} if isinstance(value, Mapping) else value
        )
    return value


def _type(annotation: Any) -> tuple[Any, list[Any], bool]:
    """A field's type, the bounds and units that come with it, and whether it may be None besides."""
    metadata: list[Any] = []
    optional = False
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *more = get_args(annotation)
            metadata += more
        elif get_origin(annotation) in (Union, types.UnionType):
            optional = optional or types.NoneType in get_args(annotation)
            annotation = next(one for one in get_args(annotation) if one is not types.NoneType)
        else:
            return annotation, _flat(metadata), optional


def _flat(metadata: Iterable[Any]) -> list[Any]:
    """`Field(gt=0)` as the bounds that it stands for."""
    return [bound for one in metadata for bound in (one.metadata if isinstance(one, FieldInfo) else [one])]


_SEVERAL = (list, tuple, set, frozenset)
_KINDS = {int: "whole number", float: "number", str: "text"}


def wanted(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """The values that a field of this type takes, in words: `a number of seconds above 0`.

    `metadata` are its bounds and unit, as pydantic keeps them.
    """
    inner, within, optional = _type(annotation)
    metadata = [*within, *metadata]
    origin, arguments = get_origin(inner), get_args(inner)
    if origin is Literal:
        words = f"one of {', '.join(map(str, arguments))}"
    elif isinstance(inner, EnumType):
        words = f"one of {', '.join(str(inner[name].value) for name in inner.__members__)}"
    elif inner is bool:
        words = "true or false"
    elif origin in _SEVERAL:
        words = f"a list [one, two] of {_length(metadata)}{_each(arguments[0])}"
    elif origin is dict:
        words = f"a table {{name: value}} of {_length(metadata)}{_each(arguments[1])}"
    elif inner in _KINDS:
        words = f"{'' if inner is str else 'a '}{_KINDS[inner]}{_unit(metadata)}{_range(metadata)}"
        words += ", not empty" if inner is str and _length(metadata) else ""
    else:
        words = "a group of settings" if fields(inner) else f"a {getattr(inner, '__name__', inner)}"
    return f"{words}, or null" if optional else words


def _each(annotation: Any) -> str:
    """What the elements of a list are, in the plural: `numbers from 0 to below 1`."""
    inner, metadata, _ = _type(annotation)
    plural = {int: "whole numbers", float: "numbers", str: "texts"}.get(inner, "values")
    return f"{plural}{_unit(metadata)}{_range(metadata)}"


def _unit(metadata: Sequence[Any]) -> str:
    return "".join(f" of {one.name}" for one in metadata if isinstance(one, Unit))


def _range(metadata: Sequence[Any]) -> str:
    bounds: dict[str, Any] = {}
    for one in metadata:
        bounds |= {
            name: getattr(one, name) for name in ("ge", "gt", "le", "lt") if getattr(one, name, None) is not None
        }
    words = ""
    if "gt" in bounds:
        words += f" above {bounds['gt']}"
    if "ge" in bounds:
        words += f" from {bounds['ge']} {'to' if {'le', 'lt'} & bounds.keys() else 'up'}"
    if "le" in bounds:
        words += f" {bounds['le']}" if "ge" in bounds else f" up to {bounds['le']}"
    if "lt" in bounds:
        words += f" below {bounds['lt']}"
    return words


def _length(metadata: Sequence[Any]) -> str:
    least = next((one.min_length for one in metadata if getattr(one, "min_length", None) is not None), None)
    most = next((one.max_length for one in metadata if getattr(one, "max_length", None) is not None), None)
    if least is None and most is None:
        return ""
    return f"{least} " if least == most else f"{least} or more "


def _known(kind: Any) -> str:
    names = kind if isinstance(kind, Mapping) else fields(kind)
    return f"keys here: {', '.join(names) or 'none'}"


def _explained(kind: Any, tree: Any, error: ValidationError, prefix: str) -> str:
    """One line on the first thing that pydantic found in `tree`."""
    first = error.errors(include_url=False)[0]
    path = [str(key) for key in first["loc"]]
    owner, field, depth = _field(kind, path)
    where = prefix + "".join(f"{key}." for key in path[: depth - 1 if field else depth])
    if first["type"] == "unexpected_keyword_argument":
        return f"unknown configuration key {where + path[-1]!r}{nearest(path[-1], fields(owner))} ({_known(owner)})"
    if first["type"] == "value_error":  # a check of a group's own, whose words begin with the field's name
        return where + first["msg"].removeprefix("Value error, ")
    if field is None:
        return f"{where.rstrip('.')}={shown(first['input'])}: {first_line(ValueError(first['msg']))} ({_known(owner)})"
    key, value, annotation, metadata = path[depth - 1], first["input"], field.annotation, field.metadata
    inner, _, _ = _type(annotation)
    if len(path) > depth and get_origin(inner) is dict:  # one of its entries
        key, annotation, metadata = f"{key}.{path[depth]}", get_args(inner)[1], []
    elif len(path) > depth:
        for name in path[:depth]:
            tree = tree[name]
        value = tree
    if first["type"].startswith("missing"):
        return f"{where}{key} has to be given: {wanted(annotation, metadata)}"
    value = shown(value)
    near = nearest(value, map(str, get_args(inner))) if get_origin(inner) is Literal else ""
    words = wanted(annotation, metadata)
    words = words.replace("number", "finite number", 1) if first["type"] == "finite_number" else words
    return f"{where}{key}={value} is not {words}{near}"


def _field(kind: Any, path: Sequence[str]) -> tuple[Any, FieldInfo | None, int]:
    """The group in which a path lies, its field there, if it has one, and how many parts of the path lead to it."""
    for depth, name in enumerate(path, start=1):
        if name not in fields(kind):
            return kind, None, depth - 1
        field = fields(kind)[name]
        if not fields(_type(field.annotation)[0]):
            return kind, field, depth
        kind = _type(field.annotation)[0]
    return kind, None, len(path)
