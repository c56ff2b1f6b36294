"""The settings of another package's tasks: checked before PyTorch is imported where they stand by themselves."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import pytest
from emcl.tasks.task_settings import RetrievalConfig
from pydantic import Field

from emcl.config import resolve
from emcl.config_docs import describe
from emcl.errors import UserError
from emcl.registry import early_settings_of, settings_of, task_class, task_entries
from emcl.settings import as_group, build, group

TASK = """
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, kw_only=True)
class OddConfig:
    '''Odd ones.'''

    width: int = 64
    label: str = "odd"
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.width > 64:
            raise ValueError(f"width={self.width} is above 64")


class OddTask:
    config_class = OddConfig
"""
SETTINGS = """
from pydantic import Field

from emcl.settings import group


@group
class OddConfig:
    width: int = Field(64, le=64, description="Of it.")
    label: str = "odd"
"""


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, apart: bool) -> None:
    """A package of one task, `odd`, whose settings stand apart from it, or in its own module."""
    points = "[emcl.tasks]\nodd = odd_task:OddTask\n"
    if apart:
        points += "[emcl.settings]\nodd = odd_settings:OddConfig\n"
        (folder / "odd_settings.py").write_text(SETTINGS)
        (folder / "odd_task.py").write_text("raise RuntimeError('imported')")
    else:
        (folder / "odd_task.py").write_text(TASK)
    (folder / "odd_task-1.dist-info").mkdir()
    (folder / "odd_task-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-task\nVersion: 1\n")
    (folder / "odd_task-1.dist-info" / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(folder)
    for name in ("odd_task", "odd_settings"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_settings_that_stand_apart_are_checked_without_their_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, apart=True)
    early = resolve(["odd"], overrides=["tasks.odd.width=32", "tasks.odd.label=0012"], kind_of=early_settings_of)
    assert (early.tasks["odd"].width, early.tasks["odd"].label) == (32, "0012")
    with pytest.raises(UserError, match="tasks.odd.width=65 is not a whole number up to 64"):
        resolve(["odd"], overrides=["tasks.odd.width=65"], kind_of=early_settings_of)
    assert "odd_task" not in sys.modules
    assert "| `tasks.odd.width` | `64` | a whole number up to 64 | Of it. |" in describe()


def test_a_plain_dataclass_in_the_tasks_own_module_is_checked_with_the_task(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, apart=False)
    assert early_settings_of("odd") is None
    assert "odd" not in resolve(["odd"], overrides=["tasks.odd.width=many"], kind_of=early_settings_of).tasks
    settings = resolve(["odd"], overrides=["tasks.odd.names=[yes, 12]", "tasks.odd.label=on"]).tasks["odd"]
    assert (settings.width, settings.names, settings.label) == (64, ["yes", "12"], "on")
    assert isinstance(settings, sys.modules["odd_task"].OddConfig)
    with pytest.raises(UserError, match="^tasks.odd.width=65 is above 64$"):
        resolve(["odd"], overrides=["tasks.odd.width=65"])
    with pytest.raises(UserError, match="^tasks.odd.width=many is not a whole number$"):
        resolve(["odd"], overrides=["tasks.odd.width=many"])
    with pytest.raises(UserError, match="unknown configuration key 'tasks.odd.wdith', did you mean 'width'"):
        resolve(["odd"], overrides=["tasks.odd.wdith=3"])
    assert "`tasks.odd.label`" in describe()


def test_another_packages_settings_of_the_same_name_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, apart=False)
    (tmp_path / "other-1.dist-info").mkdir()
    (tmp_path / "other-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (tmp_path / "other-1.dist-info" / "entry_points.txt").write_text("[emcl.settings]\nodd = nowhere:Config\n")
    assert early_settings_of("odd") is None
    assert settings_of("odd") is not None


def test_settings_of_no_task_name_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, apart=True)
    with pytest.raises(UserError, match="unknown task 'od', did you mean 'odd'"):
        settings_of("od")


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("trouble", ["import no_such_package", "from json import no_such_name", ""])
def test_a_task_that_cannot_be_imported_is_named_in_one_line(
    trouble: str, apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, apart=apart)
    (tmp_path / f"odd_{'settings' if apart else 'task'}.py").write_text(trouble)
    with pytest.raises(UserError, match=r"^task odd: odd_\w+:Odd\w+ of odd-task cannot be imported: .*(no_such|Odd)"):
        resolve(["odd"])


@pytest.mark.parametrize("name", task_entries())
def test_a_tasks_settings_are_of_the_class_that_it_names(name: str) -> None:
    assert settings_of(name) is as_group(task_class(name).config_class)


def test_settings_that_extend_a_group_are_one_too_or_told_apart() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Plain(RetrievalConfig):
        more: list[str] = field(default_factory=list)

    @group
    class Extended(RetrievalConfig):
        more: list[str] = Field(default_factory=list)

    with pytest.raises(TypeError, match="Plain extends a group of settings: make it one by `@group`"):
        as_group(Plain)
    built = build(as_group(Extended), {"weight": "2", "more": "[a, b]"})
    assert (built.weight, built.more) == (2.0, ["a", "b"])


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@pytest.mark.parametrize(
    ("name", "typed", "value", "wrong", "said"),
    [
        ("pair", "[3, 4]", (3.0, 4.0), "[3, x]", "pair=[3, x] is not a list [one, two] of numbers"),
        ("names", "[on, 12]", {"on", "12"}, "on", "names=on is not a list [one, two] of texts"),
        ("colour", "red", Colour.RED, "green", "colour=green is not one of red, blue"),
        ("place", "a/0012", Path("a/0012"), None, ""),
        ("counts", "{a: [1, 2], b: []}", {"a": [1, 2], "b": []}, "{a: 3}", "counts.a=3 is not a list"),
        ("least", "null", None, "low", "least=low is not a number, or null"),
    ],
)
def test_settings_of_other_types_are_read_and_refused_alike(
    name: str, typed: str, value: object, wrong: str | None, said: str
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Config:
        pair: tuple[float, float] = (1.0, 2.0)
        names: set[str] = field(default_factory=set)
        colour: Colour = Colour.BLUE
        place: Path = Path()
        counts: dict[str, list[int]] = field(default_factory=dict)
        least: float | None = 0.0

    assert getattr(build(as_group(Config), {name: typed}), name) == value
    if wrong is not None:
        with pytest.raises(UserError) as caught:
            build(as_group(Config), {name: wrong}, "tasks.odd.")
        assert f"tasks.odd.{said}" in str(caught.value)
