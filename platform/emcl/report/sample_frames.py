"""Frames of a result's samples, for its examples, if the shards are available."""

from __future__ import annotations

from functools import lru_cache

from emcl.data.decode import DecodeError
from emcl.data.shards import ShardSet, open_shards
from emcl.errors import UserError
from emcl.pictures import frames_of, strip_url
from emcl.task import Result
from emcl.task.task_report import PictureOf


def pictures(result: Result) -> PictureOf:
    """Pictures of the samples of its test split, by their ids."""
    shards = _shards(str(result.config.data.test))
    if shards is None:
        return lambda _: None
    rows = {row.sample.id: number for number, row in enumerate(shards.rows)}
    return lambda identity: _picture(shards, result, rows.get(identity))


@lru_cache(maxsize=1)
def _shards(pattern: str) -> ShardSet | None:
    """Opened once for all tasks of a run; None without the shards, as a report may be made on another machine."""
    try:
        return open_shards(pattern)
    except UserError:
        return None


def _picture(shards: ShardSet, result: Result, row: int | None) -> str | None:
    if row is None:
        return None
    try:
        frames = frames_of(shards, result.config, row)
    except (DecodeError, OSError):
        return None
    return strip_url(frames)
