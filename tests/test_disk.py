"""Files that several processes write, and disks that refuse: nothing is torn, lost, or found out too late."""

from __future__ import annotations

import errno
import fcntl
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from emcl.disk import aside, free_bytes, in_turn, replace_folder, why_not_written, write_whole


def test_a_text_is_the_old_one_or_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    write_whole(path, "old")

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="full"):
            write_whole(path, "new")
    assert path.read_text() == "old" and [path] == list(tmp_path.iterdir())


def test_several_may_write_one_text_at_once(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    texts = [str(number) * 1000 for number in range(200)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: write_whole(path, text), texts))
    assert path.read_text() in texts and [path] == list(tmp_path.iterdir())


def test_one_goes_in_once_the_other_is_out(tmp_path: Path) -> None:
    lock, order = tmp_path / ".lock", list[str]()

    def second() -> None:
        with in_turn(lock):
            order.append("second")

    with in_turn(lock):
        waits = threading.Thread(target=second)
        waits.start()
        waits.join(0.3)
        order.append("first")
    waits.join()
    assert order == ["first", "second"]


def test_where_there_are_no_locks_it_is_an_error_unless_it_may_be_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(OSError, match="not supported"), in_turn(tmp_path / ".lock"):
        pass
    with in_turn(tmp_path / ".lock", without_locks=True):
        pass


@pytest.mark.parametrize("cut_short", [False, True])
def test_a_folder_takes_the_place_of_another_which_waits_aside_until_it_stands(
    cut_short: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, new = tmp_path / "best", tmp_path / "new"
    for folder, text in ((best, "old"), (new, "new")):
        folder.mkdir()
        (folder / "text").write_text(text)
    rename: Callable[[Path, Path], Path] = Path.rename

    def killed(path: Path, target: Path) -> Path:
        if cut_short and path == new:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    if cut_short:
        with pytest.raises(KeyboardInterrupt):
            replace_folder(new, best)
        assert (aside(best) / "text").read_text() == "old" and not best.exists()
    else:
        replace_folder(new, best)
        assert (best / "text").read_text() == "new" and list(tmp_path.iterdir()) == [best]


def test_room_and_permission_are_those_of_what_is_there(tmp_path: Path) -> None:
    deep = tmp_path / "a" / "b"
    assert why_not_written(deep) is None and not deep.parent.exists()
    assert 0 < free_bytes(deep) <= shutil.disk_usage(tmp_path).total
    deep.parent.touch()
    assert why_not_written(deep) == f"{deep.parent} is a file"
