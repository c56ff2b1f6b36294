"""Finds shards and reads single samples from them.

A shard is a plain WebDataset tar. webdataset itself reads tars as streams, which ties the order of samples to
the number of workers and ranks. Here a tar's headers are read once and every sample is then a byte range of its
file, so that the order can be a pure function of (seed, step). Only videos and JSON are read.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from braceexpand import braceexpand

from emcl.data.bad_samples import check_bad_fraction
from emcl.data.remote import is_remote, localise
from emcl.data.samples import VIDEO_ENDINGS, Sample
from emcl.errors import UserError, first_line
from emcl.resources import is_file

OPEN_FILES = 16
LARGEST_JSON = 64 * 2**20
"""Bytes; a larger JSON member is not read into memory."""


@dataclass(frozen=True)
class Row:
    """One sample: the byte range of its video, and the content of its JSON."""

    shard: int
    offset: int
    size: int
    sample: Sample


def find_shards(pattern: str) -> list[Path]:
    """Files of a brace pattern (`train-{000000..000015}.tar`), a glob, a folder, or several joined by `::`.

    URLs are copied to a local cache (data/remote.py).

    Raises:
        UserError: nothing matches, or a file of a brace pattern is missing.
    """
    shards: list[Path] = []
    for one_pattern in pattern.split("::"):
        if is_remote(one_pattern):
            shards += localise(one_pattern)
            continue
        paths = _matching(one_pattern)
        missing = [path for path in paths if not is_file(path)]
        if missing or not paths:
            which = (
                f"{missing[0]} is missing ({len(missing)} of {len(paths)})"
                if missing and len(paths) > 1
                else "no such file"
            )
            raise UserError(
                f"no shard matches {one_pattern}: {which}; make shards with `emcl prepare`, or give data.train=PATTERN"
            )
        shards += paths
    return shards


def _matching(pattern: str) -> list[Path]:
    try:
        if Path(pattern).is_dir():
            return sorted(Path(pattern).glob("*.tar"))
        if any(sign in pattern for sign in "*?["):
            return [Path(name) for name in sorted(glob.glob(pattern))]  # noqa: PTH207, the pattern may be absolute
        return [Path(name) for name in braceexpand(pattern)]
    except (OSError, ValueError) as error:  # a name that is too long, braces that do not close
        raise UserError(f"{pattern} is no pattern of shards: {first_line(error)}") from None


class ShardSet:
    """Indexed shards: `rows` are in the order of files and members. Can be passed to loader processes.

    A truncated shard, or a sample without its JSON or video, is an error. With `max_bad_fraction`, up to that
    fraction of the samples may be damaged: they are skipped on every rank alike, and listed in `damaged`.

    Raises:
        UserError: too many damaged samples, or no sample at all.
    """

    def __init__(self, paths: Sequence[Path], max_bad_fraction: float = 0.0) -> None:
        self.paths = list(paths)
        with ThreadPoolExecutor(8) as pool:
            indexed = list(pool.map(_index, range(len(self.paths)), self.paths))
        self.rows: list[Row] = [row for shard in indexed for row in shard.rows]
        self.lengths = [len(shard.rows) for shard in indexed]
        self.damaged = [line for shard in indexed for line in shard.damaged]
        self._files: OrderedDict[tuple[int, int], int] = OrderedDict()
        if self.damaged and not max_bad_fraction:
            raise UserError(self.damaged[0])
        lost = sum(shard.lost for shard in indexed)
        check_bad_fraction(self.damaged, len(self.rows) + lost, max_bad_fraction, "samples are lost", count=lost)
        if not self.rows:
            raise UserError(f"no sample in {len(self.paths)} shard(s), the first {self.paths[0]}")

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self) -> tuple[str, str]:
        """The first sample's benchmark, and its protocol as recorded by `emcl prepare`; empty if unknown."""
        return self.rows[0].sample.source, str(_prepared(self.paths[0].parent, "protocol") or "")

    def read(self, row: Row) -> bytes:
        """The video's bytes. A process keeps at most OPEN_FILES tars open."""
        key = (os.getpid(), row.shard)  # a descriptor opened before a fork is not shared
        if key not in self._files:
            while len(self._files) >= OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[key] = os.open(self.paths[row.shard], os.O_RDONLY)
        self._files.move_to_end(key)
        video = os.pread(self._files[key], row.size, row.offset)
        if len(video) != row.size:
            raise OSError(f"{self.paths[row.shard]} is shorter than when it was indexed")
        return video

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": OrderedDict()}

    def __del__(self) -> None:
        for (process, _), descriptor in getattr(self, "_files", {}).items():
            if process == os.getpid():
                os.close(descriptor)


def open_shards(pattern: str) -> ShardSet:
    return ShardSet(find_shards(pattern))


@dataclass
class _Indexed:
    """The content of one shard."""

    rows: list[Row]
    damaged: list[str]
    lost: int
    """Number of lost samples, as far as known."""


def _index(number: int, path: Path) -> _Indexed:
    """Indexes all readable samples of a shard."""
    members = _Members(path)
    torn = None
    try:
        if not _ends_as_a_tar(path):
            torn = f"{path} is cut short (it lacks a tar's end): copy or prepare the shard again"
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    members.take(tar, member)
    except (tarfile.TarError, OSError) as error:
        torn = torn or f"{path} is not a whole tar ({error}): copy or prepare the shard again"
    if not torn:
        members.check_pairs()
    whole = members.videos.keys() & members.texts.keys() - members.bad.keys()
    rows = [Row(number, *byte_range, members.texts[key]) for key, byte_range in members.videos.items() if key in whole]
    lost = len(members.bad)
    if torn:
        promised = _prepared(path.parent, "shards", path.name, "samples")
        lost = max(1, lost, (promised if isinstance(promised, int) else 0) - len(rows))
    return _Indexed(rows, [*([torn] if torn else []), *members.bad.values()], lost)


class _Members:
    """A tar's videos and JSON by key, and the bad ones. Names are never used as paths, so `..` is harmless."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.videos: dict[str, tuple[int, int]] = {}
        self.texts: dict[str, Sample] = {}
        self.bad: dict[str, str] = {}
        self._size = path.stat().st_size if path.is_file() else 0

    def take(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Adds one member.

        Raises:
            tarfile.ReadError: its content is truncated.
        """
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        key = f"{folder}/{stem}"
        where = f"{self.path}:{member.name}"
        if ending == "json" and member.size > LARGEST_JSON:
            self.bad[key] = f"{where}: {member.size} bytes are no sample's JSON"
        elif ending == "json":
            stream = tar.extractfile(member)
            assert stream is not None
            try:
                self.texts[key] = Sample.from_json(stream.read(), where)
            except UserError as error:
                self.bad[key] = str(error)
        elif ending.lower() in VIDEO_ENDINGS:
            if key in self.videos:
                self.bad[key] = f"{self.path}: two videos for the key {key.lstrip('/')!r}"
            if member.offset_data + member.size > self._size:
                raise tarfile.ReadError(f"cut short at {member.name}")
            self.videos[key] = (member.offset_data, member.size)

    def check_pairs(self) -> None:
        for one, other, what in ((self.videos, self.texts, "JSON"), (self.texts, self.videos, "video")):
            for key in one:
                if key not in other and key not in self.bad:
                    pair = "a shard pairs KEY.mp4 with KEY.json (write it with `emcl prepare`)"
                    self.bad[key] = f"{self.path}: {key.lstrip('/')} has no {what}; {pair}"


def _prepared(folder: Path, *keys: str) -> object:
    """An entry of the `index.json` that `emcl prepare` wrote next to the shards; None if there is none."""
    try:
        entry = json.loads((folder / "index.json").read_text())
        for key in keys:
            entry = entry[key]
        return entry
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _ends_as_a_tar(path: Path) -> bool:
    """Whether the file ends with two blocks of zeros; without this check a truncated tar may look complete."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 1024))
        return stream.read() == bytes(1024)
