"""Whom the ranks wait for, found from lines alone: no process, no clock."""

from __future__ import annotations

from datetime import timedelta

import psutil
import pytest
import torch
import torch.distributed as dist

from emcl import distributed
from emcl.config import Config
from emcl.errors import UserError
from emcl.train.watchdog import BEAT, SILENT, SLOW, Judge, Line
from local_ranks import free_port

PATIENCE = 600.0


def line(beat: int, *, step: int = 7, doing: str = "training", moves: int = 0, allowed: float = PATIENCE) -> Line:
    return Line(beat, step, doing, moves, allowed)


def looks_until_it_says(judge: Judge, lines_at: object, most: int = 3000) -> tuple[int, str]:
    for look in range(most):
        said = judge.look(lines_at(look))  # type: ignore[operator]
        if said:
            return look, said
    raise AssertionError("nothing was said")


def test_a_rank_without_beats_is_named_whatever_the_others_wait_in() -> None:
    look, said = looks_until_it_says(Judge(0, SILENT), lambda n: {0: line(n, moves=n), 1: line(3), 2: line(n, moves=n)})
    assert look * BEAT == SILENT
    assert "rank 1 (training at step 7)" in said and "rank 2" not in said


def test_a_job_that_was_suspended_as_a_whole_goes_on() -> None:
    judge = Judge(0, SILENT)
    for beat in range(100):  # however long the clock says that it was between two looks
        assert judge.look({rank: line(beat, moves=beat) for rank in range(3)}) is None


def test_a_rank_that_beats_and_does_not_get_on_is_named_once_all_wait_for_it() -> None:
    lines = lambda n: {0: line(n), 1: line(n, step=6, doing="loading"), 2: line(n)}  # noqa: E731
    look, said = looks_until_it_says(Judge(0, SILENT), lines)
    assert PATIENCE < look * BEAT <= PATIENCE + 2 * BEAT
    assert "the others wait for rank 1 (loading at step 6)" in said


def test_nobody_is_named_while_any_rank_gets_on() -> None:
    """Features of uneven shards: one rank works for hours while the others wait for it."""
    judge = Judge(0, SILENT)
    for look in range(3000):
        lines = {0: line(look), 1: line(look, moves=look // 200), 2: line(look)}
        assert judge.look(lines) is None


def test_what_may_be_slow_has_more_time() -> None:
    slow = lambda n: {0: line(n, doing="saving", allowed=SLOW * PATIENCE), 1: line(n)}  # noqa: E731
    look, said = looks_until_it_says(Judge(0, SILENT), slow)
    assert SLOW * PATIENCE < look * BEAT <= SLOW * PATIENCE + 2 * BEAT
    assert "rank 0 (saving at step 7)" in said


def test_many_silent_ranks_are_told_in_one_short_line() -> None:
    lines = lambda n: {rank: line(n if rank < 256 else 0) for rank in range(512)}  # noqa: E731
    _, said = looks_until_it_says(Judge(0, SILENT), lines)
    assert "and 248 others" in said and len(said) < 500


def test_collectives_may_wait_longer_than_the_watch_does() -> None:
    distributed.start()
    options = dist.group.WORLD._get_backend(torch.device("cpu")).options
    assert options._timeout > timedelta(seconds=2 * SLOW * Config().patience)


def test_gloo_goes_by_the_interface_on_which_the_ranks_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert "127.0.0.1" in [one.address for one in psutil.net_if_addrs()[str(distributed._interface())]]
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert distributed._interface() is None


def test_ranks_that_do_not_come_are_waited_for_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "MEETING", timedelta(seconds=2))
    with pytest.raises(UserError, match="not all 2 ranks came within .* minutes to 127.0.0.1"):
        distributed._meet()
