"""Finding shards and reading single samples out of them.

A shard is a plain WebDataset tar. webdataset itself reads tars as streams, which ties the order of samples to
the number of workers and ranks; here a tar's headers are read once, and every sample is then a byte range of its
file, so that the order can be a pure function of (seed, step). Only videos and JSON are ever looked at.
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

from webdataset.shardlists import expand_urls

from emcl.data.remote import is_remote, localise
from emcl.data.samples import VIDEO_ENDINGS, Sample
from emcl.errors import UserError

OPEN_FILES = 16
LARGEST_JSON = 64 * 2**20
"""Bytes: a member that says more is not read into memory."""


@dataclass(frozen=True)
class Row:
    """One sample: where its video's bytes are, and what its JSON says."""

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
    found: list[Path] = []
    for part in pattern.split("::"):
        if is_remote(part):
            found += localise(part)
            continue
        if Path(part).is_dir():
            paths = sorted(Path(part).glob("*.tar"))
        elif any(sign in part for sign in "*?["):
            paths = [Path(name) for name in sorted(glob.glob(part))]  # noqa: PTH207, the pattern may be absolute
        else:
            paths = [Path(name) for name in expand_urls(part)]
        missing = [path for path in paths if not path.is_file()]
        if missing or not paths:
            which = (
                f"{missing[0]} is missing ({len(missing)} of {len(paths)})"
                if missing and len(paths) > 1
                else "no such file"
            )
            raise UserError(
                f"no shard matches {part}: {which}; make shards with `emcl prepare`, or give data.train=PATTERN"
            )
        found += paths
    return found


class ShardSet:
    """Some shards, indexed: `rows` in the order of files and members. Safe to hand to loader processes.

    A torn shard or a sample without its JSON or video is an error, but where `max_bad_fraction` of the samples may be
    so: they are left out then, the same ones on every rank, and named in `damaged`.

    Raises:
        UserError: what is damaged, or no sample at all.
    """

    def __init__(self, paths: Sequence[Path], max_bad_fraction: float = 0.0) -> None:
        self.paths = list(paths)
        with ThreadPoolExecutor(8) as pool:
            parts = list(pool.map(_index, range(len(self.paths)), self.paths))
        self.rows: list[Row] = [row for part in parts for row in part.rows]
        self.lengths = [len(part.rows) for part in parts]
        self.damaged = [line for part in parts for line in part.damaged]
        self._files: OrderedDict[tuple[int, int], int] = OrderedDict()
        lost = sum(part.lost for part in parts)
        if lost > max_bad_fraction * (len(self.rows) + lost):
            raise UserError(_too_many(self.damaged, lost, len(self.rows) + lost, max_bad_fraction))
        if not self.rows:
            raise UserError(f"no sample in {len(self.paths)} shard(s), the first {self.paths[0]}")

    def __len__(self) -> int:
        return len(self.rows)

    def origin(self) -> tuple[str, str]:
        """The benchmark that the first sample is of, and its protocol as `emcl prepare` noted it; empty if unknown."""
        sample, index = self.rows[0].sample, self.paths[0].parent / "index.json"
        try:
            protocol = json.loads(index.read_text())["protocol"] if index.is_file() else ""
        except (ValueError, KeyError, TypeError):
            protocol = ""
        return sample.source, str(protocol)

    def read(self, row: Row) -> bytes:
        """The video's bytes. At most OPEN_FILES tars are open in a process."""
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


def _too_many(damaged: list[str], lost: int, total: int, allowed: float) -> str:
    if not allowed:
        return damaged[0]
    more = f" (and {len(damaged) - 5} more)" if len(damaged) > 5 else ""
    listed = "; ".join(damaged[:5])
    return f"{lost} of {total} samples are lost, more than data.max_bad_fraction={allowed} allows: {listed}{more}"


@dataclass
class _Indexed:
    """What one shard holds."""

    rows: list[Row]
    damaged: list[str]
    lost: int
    """Samples, as far as it is known."""


def _index(number: int, path: Path) -> _Indexed:
    """All of a shard that can be read."""
    videos: dict[str, tuple[int, int]] = {}
    texts: dict[str, Sample] = {}
    bad: dict[str, str] = {}
    torn = None
    try:
        if not _ends_as_a_tar(path):
            torn = f"{path} is cut short (it lacks a tar's end): copy or prepare the shard again"
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    _take(tar, member, path, videos, texts, bad)
    except (tarfile.TarError, OSError) as error:
        torn = torn or f"{path} is not a whole tar ({error}): copy or prepare the shard again"
    for one, other, what in ((videos, texts, "JSON"), (texts, videos, "video")):
        for key in one:
            if key not in other and key not in bad and not torn:
                pair = "a shard pairs KEY.mp4 with KEY.json (write it with `emcl prepare`)"
                bad[key] = f"{path}: {key.lstrip('/')} has no {what}; {pair}"
    rows = [Row(number, *place, texts[key]) for key, place in videos.items() if key in texts and key not in bad]
    lost = len(bad)
    if torn:
        lost = max(1, len(bad), _promised(path) - len(rows))
    return _Indexed(rows, [*([torn] if torn else []), *bad.values()], lost)


def _take(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    path: Path,
    videos: dict[str, tuple[int, int]],
    texts: dict[str, Sample],
    bad: dict[str, str],
) -> None:
    """Sorts one member in. Names are never used as paths, so that `..` or a leading / do nothing."""
    folder, _, name = member.name.rpartition("/")
    stem, _, ending = name.partition(".")
    key = f"{folder}/{stem}"
    if ending == "json":
        if member.size > LARGEST_JSON:
            bad[key] = f"{path}:{member.name}: {member.size} bytes are no sample's JSON"
            return
        stream = tar.extractfile(member)
        assert stream is not None
        try:
            texts[key] = Sample.from_json(stream.read(), f"{path}:{member.name}")
        except UserError as error:
            bad[key] = str(error)
    elif ending.lower() in VIDEO_ENDINGS:
        if key in videos:
            bad[key] = f"{path}: two videos for the key {key.lstrip('/')!r}"
        if member.offset_data + member.size > path.stat().st_size:
            raise tarfile.ReadError(f"cut short at {member.name}")
        videos[key] = (member.offset_data, member.size)


def _promised(path: Path) -> int:
    """How many samples a shard should hold, by the `index.json` that `emcl prepare` left beside it; 0 if unknown."""
    try:
        return int(json.loads((path.parent / "index.json").read_text())["shards"][path.name]["samples"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _ends_as_a_tar(path: Path) -> bool:
    """Two blocks of zeros; without them a torn tar may look like a shorter one."""
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - 1024))
        return stream.read() == bytes(1024)
