"""Writes clips to shards, by several processes or jobs; resumable after a kill, and the same bytes for the same input.

The content of each shard is fixed before anything is written, from the clips and the existing videos, so any process
can write a shard, or rewrite it. A shard counts as written once its note is in `.prepare/` next to it. The process that
finishes the last shard makes `index.json` and `report.json` from all notes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emcl.data.decode import DecodeError, decode
from emcl.data.samples import Sample
from emcl.disk import write_whole
from emcl.errors import UserError
from emcl.prefetch import in_order
from emcl.prepare.clips import Clip, Report
from emcl.prepare.videos import Place, Videos, as_frames, reencode
from emcl.prepare.writer import write_shard
from emcl.version import __version__

NOTES = ".prepare"
INDEX, REPORT = "index.json", "report.json"
STORES = ("mp4", "jpeg", "raw")
AHEAD = 4
"""Clips queued per process."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """How videos are stored."""

    keep: bool = False
    """Keep files unchanged and whole; otherwise they are cut to the clip."""
    short_side: int = 256
    """Largest short side of H.264 in pixels."""
    fps: float = 3.0
    store: str = "mp4"
    """`mp4` (H.264), or square frames in training size that are very cheap to decode: `jpeg` or `raw`."""
    size: int = 224
    """Side of the square frames in pixels."""
    quality: int = 90
    """JPEG quality, on libjpeg's scale of 1 to 95."""

    def __post_init__(self) -> None:
        if self.store not in STORES:
            raise UserError(f"--store {self.store}: one of {', '.join(STORES)}")
        if self.keep and self.store != "mp4":
            raise UserError(f"--keep stores videos as they are, --store {self.store} does not: give one of them")

    def facts(self) -> dict[str, Any]:
        """The settings that determine the stored bytes."""
        if self.store == "mp4":
            return {"keep": self.keep, "short_side": self.short_side, "fps": self.fps}
        quality = {"quality": self.quality} if self.store == "jpeg" else {}
        return {"store": self.store, "size": self.size, "fps": self.fps, **quality}


@dataclass(frozen=True, kw_only=True)
class Options:
    encoding: Encoding = field(default_factory=Encoding)
    shard_size: int = 500
    processes: int | None = None
    """One per core if not given."""
    part: tuple[int, int] = (1, 1)
    """(I, N): this call writes part I of N of the shards."""
    allow_missing: bool = False
    progress: bool = True


@dataclass(frozen=True)
class Shard:
    """A shard to be written."""

    name: str
    clips: tuple[tuple[Clip, Place], ...]


def prepare_shards(
    clips: list[Clip], videos: Videos, out: Path, options: Options, *, source: str, protocol: str = ""
) -> Report | None:
    """Writes `out/SPLIT-NNNNNN.tar` for each split, `out/index.json` and `out/report.json`.

    Shards that an earlier call wrote are kept.

    Args:
        source: the benchmark, stored in every sample.
        protocol: the benchmark's protocol, stored in the index.

    Returns:
        The report, or None if other parts still have to write their shards.

    Raises:
        UserError: videos are missing without `allow_missing`, nothing can be written, or `out` has other shards.
    """
    report, shards = _plan(clips, videos, options)
    if report.missing and not options.allow_missing:
        raise UserError(
            f"{len(report.missing)} of {len(clips)} videos are not there, the first {report.missing[0]}; "
            "--allow-missing leaves them out and lists them in report.json"
        )
    if not shards:
        raise UserError(f"none of the {len(clips)} clips has a video, the first {clips[0].file}")
    _claim(out, _fingerprint(shards, options))
    own_shards = [shard for number, shard in enumerate(shards) if number % options.part[1] == options.part[0] - 1]
    _write([shard for shard in own_shards if not _note(out, shard).is_file()], out, options, source)
    if not all(_note(out, shard).is_file() for shard in shards):
        return None
    return _finish(out, shards, report, options, source, protocol)


def _plan(clips: list[Clip], videos: Videos, options: Options) -> tuple[Report, list[Shard]]:
    splits_of: dict[str, set[str]] = {}
    for clip in clips:
        splits_of.setdefault(clip.id, set()).add(clip.split)
    located = [(clip, videos.find(clip.file)) for clip in clips]
    used = {location.name for _, location in located if location}
    report = Report(
        missing=[clip.file for clip, location in located if location is None],
        in_several_splits=[name for name, splits in splits_of.items() if len(splits) > 1],
        unannotated=sorted(videos.places.keys() - used),
        empty_captions=sum(clip.empty_captions for clip in clips),
    )
    shards = []
    for split in dict.fromkeys(clip.split for clip in clips):
        present = [(clip, location) for clip, location in located if location is not None and clip.split == split]
        for number, first in enumerate(range(0, len(present), options.shard_size)):
            shards.append(Shard(f"{split}-{number:06d}.tar", tuple(present[first : first + options.shard_size])))
    return report, shards


def _fingerprint(shards: list[Shard], options: Options) -> str:
    """A hash of everything that determines the shards' bytes, except the videos' content."""
    content = [
        (shard.name, [(asdict(clip), location.name, location.size) for clip, location in shard.clips])
        for shard in shards
    ]
    text = json.dumps([options.encoding.facts(), content], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _claim(out: Path, fingerprint: str) -> None:
    plan = out / NOTES / "plan"
    if plan.is_file():
        if plan.read_text() != fingerprint:
            raise UserError(
                f"{out} holds shards of other clips, videos or settings: give another --out, or remove the folder"
            )
        return
    if any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards already: give another --out, or remove them")
    plan.parent.mkdir(parents=True, exist_ok=True)
    write_whole(plan, fingerprint)


def _note(out: Path, shard: Shard) -> Path:
    return out / NOTES / f"{shard.name}.json"


def _write(shards: list[Shard], out: Path, options: Options, source: str) -> None:
    work = partial(_make, encoding=options.encoding, source=source)
    total = sum(len(shard.clips) for shard in shards)
    processes = min(options.processes or cpu_count() or 1, max(1, total))
    with (
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
        tqdm(total=total, desc="writing shards", unit="clip", disable=not options.progress) as bar,
    ):
        # one queue for all shards, so that processes do not idle at the end of a shard
        items = (item for shard in shards for item in shard.clips)
        made = in_order((pool.submit(work, item) for item in items), AHEAD * processes)
        for shard in shards:
            broken: dict[int, str] = {}
            path = out / shard.name
            note = {"samples": write_shard(path, _good(made, shard, broken, bar)), "broken": broken, **_checksum(path)}
            if not note["samples"]:
                path.unlink()
            write_whole(_note(out, shard), json.dumps(note))


def _good(
    made: Iterator[tuple[Sample, str, bytes] | str], shard: Shard, broken: dict[int, str], bar: tqdm[Any]
) -> Iterator[tuple[Sample, str, bytes]]:
    for index, item in zip(range(len(shard.clips)), made, strict=False):
        bar.update()
        if isinstance(item, str):
            broken[index] = item
        else:
            yield item


def _make(item: tuple[Clip, Place], *, encoding: Encoding, source: str) -> tuple[Sample, str, bytes] | str:
    """A clip's sample, file extension and video bytes; or the reason why it does not decode."""
    clip, location = item
    video = location.read()
    start, end, ending = clip.start, clip.end, location.ending
    try:
        if encoding.keep:
            decode(video, frames=1, size=32, start=start, end=end)
        elif encoding.store == "mp4":
            video = reencode(video, short_side=encoding.short_side, fps=encoding.fps, start=start, end=end)
            start, end, ending = None, None, "mp4"  # only the clip is stored
        else:
            quality = encoding.quality if encoding.store == "jpeg" else None
            video = as_frames(video, size=encoding.size, fps=encoding.fps, quality=quality, start=start, end=end)
            start, end, ending = None, None, "mov"
    except DecodeError as error:
        return str(error)
    sample = Sample(
        id=clip.id, source=source, split=clip.split, captions=clip.captions, qa=clip.qa, start=start, end=end
    )
    return sample, ending, video


def _finish(out: Path, shards: list[Shard], report: Report, options: Options, source: str, protocol: str) -> Report:
    notes = {shard.name: json.loads(_note(out, shard).read_text()) for shard in shards}
    splits: dict[str, Counter[str]] = {}
    for shard in shards:
        counts = splits.setdefault(shard.name.rpartition("-")[0], Counter())
        for number, (clip, _) in enumerate(shard.clips):
            if reason := notes[shard.name]["broken"].get(str(number)):
                report.broken.append(f"{clip.file}: {reason}")
                continue
            counts.update(samples=1, captions=len(clip.captions), questions=len(clip.qa))
            if not clip.captions and not clip.qa:
                report.without_caption.append(clip.file)
    report.written = {split: counts["samples"] for split, counts in splits.items()}
    if not sum(report.written.values()):
        raise UserError(f"none of the clips is a readable video; the first: {report.broken[0]}")
    index = {
        "format": 1,
        "emcl": __version__,
        "source": source,
        "protocol": protocol,
        "encoding": options.encoding.facts(),
        "splits": splits,
        "shards": {
            name: {key: note[key] for key in ("samples", "bytes", "sha256")}
            for name, note in notes.items()
            if note["samples"]
        },
    }
    write_whole(out / REPORT, json.dumps(asdict(report), indent=1, ensure_ascii=False))
    write_whole(out / INDEX, json.dumps(index, indent=1))
    return report


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
