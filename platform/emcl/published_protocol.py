"""The published training and scoring as data (configs/protocol/), and where settings deviate from it.

A record has the published value of every setting that can change a figure, the facts that no setting stands for, and
the deviations of the shipped recipes, each with its reason. What changes no figure is listed as `operational`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, TypeAdapter

from emcl.config import Config, flatten, from_dict
from emcl.errors import UserError
from emcl.inline_values import as_typed
from emcl.recipe import read_recipe
from emcl.resources import find_file, shipped_files
from emcl.settings import NOTHING, group
from emcl.suggestions import nearest

Form = Literal["published_recipe", "ours"]
"""recipe/published/NAME, or recipe/NAME."""
FORMS: tuple[Form, ...] = ("published_recipe", "ours")
ABSENT = "absent"
"""Stands for the value of a key that a table of options does not have."""
ROOT = "${data.root}"
"""In a record's values, the run's own."""


@group
class Listed:
    """A deviation of a recipe."""

    value: Any
    because: str = Field(min_length=1)


@group
class Fact:
    """One setting."""

    published: Any
    source: str = Field("", description="Who states it.")
    shown: str = Field("", description="A golden file, or a test.")
    unknown: str = Field("", description="What had to be assumed.")
    published_recipe: Listed | None = None
    ours: Listed | None = None


@group
class BuiltIn:
    """What no setting stands for."""

    published: str
    source: str
    here: str
    same: bool = Field(False, description="Whether what is done here gives the published numbers.")
    because: str = Field("", description="Of a deviation of all recipes.")
    unknown: str = Field("", description="What had to be assumed.")
    shown: str = Field("", description="A golden file, or a test; of what is the same.")
    ours: Listed | None = Field(None, description="What our recipes do instead.")


@group
class Record:
    """One benchmark's protocol."""

    benchmark: str
    recipe: str
    facts: dict[str, Fact]
    built_in: dict[str, BuiltIn]
    operational: list[str]


@dataclass(frozen=True)
class Deviation:
    """A setting that is not as published."""

    key: str
    published: str
    here: str
    because: str | None
    """The listed reason; None where the record does not list it."""


def records() -> list[Record]:
    """Those of all benchmarks."""
    files = [read_recipe(find_file(f"protocol/{name}", "protocol")) for name in shipped_files("protocol")]
    return [_record(layers) for layers in files if "benchmark" in layers[-1]]


def record_of(name: str) -> Record:
    """A benchmark's record by the name of its recipe.

    Raises:
        UserError: there is none.
    """
    by_name = {record.recipe: record for record in records()}
    name = name.removeprefix("published/")
    if name not in by_name:
        raise UserError(f"no published protocol of {name!r}{nearest(name, by_name)} (there are {', '.join(by_name)})")
    return by_name[name]


def _record(layers: Sequence[Mapping[str, Any]]) -> Record:
    """Later layers add to a fact what they say of it."""
    whole: dict[str, Any] = {}
    for layer in layers:
        for part, value in layer.items():
            if part in ("facts", "built_in"):
                of_part = whole.setdefault(part, {})
                for name, fact in value.items():
                    of_part[name] = _known({**of_part.get(name, {}), **fact}) if part == "facts" else fact
            else:
                whole[part] = value
    record: Record = TypeAdapter(Record).validate_python(whole)
    return record


def _known(fact: Mapping[str, Any]) -> dict[str, Any]:
    """Without the deviations that a benchmark's record takes back (`ours: null`)."""
    return {name: value for name, value in fact.items() if not (name in FORMS and value in NOTHING)}


def deviations(config: Config, record: Record, form: Form) -> list[Deviation]:
    """The settings of `config` that are not as published, by key.

    Args:
        form: whose listed deviations explain one.
    """
    here, published, listed = _compared(config, record), _values(config, record), _values(config, record, form)
    found = []
    for key in sorted(here.keys() | published.keys()):
        value, theirs = here.get(key, ABSENT), published.get(key, ABSENT)
        if _alike(value, theirs):
            continue
        explains: Listed | None = getattr(record.facts.get(key), form, None)
        because = explains.because if explains and _alike(listed.get(key, ABSENT), value) else None
        found.append(Deviation(key, as_typed(theirs), as_typed(value), because))
    return found


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are the same; options of components are text, and `1` is `1.0` there."""
    if isinstance(one, str) and isinstance(other, str):
        with suppress(ValueError):
            return float(one) == float(other)
    return bool(one == other)


def unrecorded(config: Config, record: Record) -> list[str]:
    """Settings that can change a figure and that the record does not know."""
    return sorted(_compared(config, record).keys() - record.facts.keys())


def _compared(config: Config, record: Record) -> dict[str, Any]:
    """The settings by key, without operational ones."""
    return {key: value for key, value in flatten(config).items() if not _is_operational(key, record)}


def _is_operational(key: str, record: Record) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in record.operational)


def _values(config: Config, record: Record, form: Form | None = None) -> dict[str, Any]:
    """The published settings as this version builds them; with the listed deviations of a recipe's form, if given."""
    values = {}
    for key, fact in record.facts.items():
        listed: Listed | None = getattr(fact, form) if form else None
        values[key] = fact.published if listed is None else listed.value
    tasks = dict.fromkeys(key.split(".")[1] for key in values if key.startswith("tasks."))
    root = config.data.root  # put in here, as OmegaConf takes longer than all the rest
    given = [f"{key}={as_typed(value).replace(ROOT, root)}" for key, value in values.items() if value != ABSENT]
    built = from_dict([{"tasks": dict.fromkeys(tasks, "")}], overrides=[f"data.root={root}", *given])
    return _compared(built, record)


def shipped_forms(record: Record) -> Iterator[tuple[Form, str]]:
    """The shipped recipes of a benchmark: which form, and the recipe's name."""
    shipped = shipped_files("recipe")
    named: list[tuple[Form, str]] = [("published_recipe", f"published/{record.recipe}"), ("ours", record.recipe)]
    yield from ((form, name) for form, name in named if name in shipped)
