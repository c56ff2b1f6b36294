"""A task's settings, read from its file without importing it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from emcl.errors import UserError
from emcl.registry import settings_class

FILE = """
from __future__ import annotations

from dataclasses import dataclass, field

import a_library_that_takes_seconds_or_is_not_there

WIDTHS = (32, 64)
LARGEST = WIDTHS[-1]


def check(width: int) -> None:
    if width > LARGEST:
        raise ValueError(f"width={width} is above {LARGEST}")


@dataclass(frozen=True, kw_only=True)
class Common:
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OddConfig(Common):
    width: int = LARGEST
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check(self.width)


class OddTask(a_library_that_takes_seconds_or_is_not_there.Module):
    config_class = OddConfig
"""


def install(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package of one task, `odd`."""
    (folder / "odd_task.py").write_text(text)
    (folder / "odd_task-1.dist-info").mkdir()
    (folder / "odd_task-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-task\nVersion: 1\n")
    (folder / "odd_task-1.dist-info" / "entry_points.txt").write_text("[emcl.tasks]\nodd = odd_task:OddTask\n")
    monkeypatch.syspath_prepend(folder)


def test_settings_come_with_what_they_use_and_without_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, FILE, monkeypatch)
    kind = settings_class("odd")
    assert kind is not None and "odd_task" not in sys.modules
    assert (kind().width, kind().weight, kind().names) == (64, 1.0, [])
    with pytest.raises(ValueError, match="width=65 is above 64"):
        kind(width=65)


@pytest.mark.parametrize(
    "change",
    [
        ("config_class = OddConfig", "config_class = made()"),
        ("LARGEST = WIDTHS[-1]", "LARGEST = a_library_that_takes_seconds_or_is_not_there.LARGEST"),
        ("class OddConfig", "class Other"),
        ("WIDTHS = (32, 64)", "WIDTHS = (32, "),
    ],
)
def test_settings_that_cannot_be_read_alone_are_left_to_the_task(
    change: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, FILE.replace(*change), monkeypatch)
    assert settings_class("odd") is None


def test_settings_of_no_task_name_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, FILE, monkeypatch)
    with pytest.raises(UserError, match="unknown task 'od', did you mean 'odd'"):
        settings_class("od")
