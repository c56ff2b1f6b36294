"""One's own videos to shards, by one command.

    emcl prepare folder --videos DIR_OR_TAR --annotations captions.csv --out shards/mine

The table has a header with `file` and `caption`, one line a caption (so a file may stand several times); optional
columns: `split` (train where absent), `id`, `start` and `end` in seconds. A JSON list or JSON Lines of objects may
stand in its place, `captions` being a list.
"""

from __future__ import annotations

import csv
import json
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from emcl.data.decode import DecodeError, decode
from emcl.data.samples import VIDEO_ENDINGS, Sample
from emcl.errors import UserError
from emcl.prepare.writer import write_shard


@dataclass
class Clip:
    """One sample to write."""

    file: str
    id: str
    split: str
    captions: list[str] = field(default_factory=list)
    qa: list[dict[str, str]] = field(default_factory=list)
    start: float | None = None
    end: float | None = None


@dataclass
class Report:
    """What was written and what was not, and why."""

    written: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    without_caption: list[str] = field(default_factory=list)


def read_table(path: Path) -> list[Clip]:
    """Clips of a CSV, a JSON list or JSON Lines.

    Raises:
        UserError: no such file, no `file` and `caption` columns, a line that does not fit.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file")
    clips: dict[tuple[str, str], Clip] = {}
    for number, row in enumerate(_rows(path), 2 if path.suffix == ".csv" else 1):
        where = f"{path}, line {number}"
        file = str(row.get("file") or "").strip()
        captions = row.get("captions") or ([row["caption"]] if row.get("caption") else [])
        if not file:
            raise UserError(f"{where}: no `file`")
        split = str(row.get("split") or "train").strip()
        try:
            start, end = (float(row[key]) if row.get(key) not in (None, "") else None for key in ("start", "end"))
        except ValueError:
            raise UserError(
                f"{where}: start and end are seconds, not {row.get('start')!r} and {row.get('end')!r}"
            ) from None
        identity = str(row.get("id") or "").strip() or Path(file).with_suffix("").as_posix() + (
            f"_{start}_{end}" if start is not None or end is not None else ""
        )
        clip = clips.setdefault((split, identity), Clip(file, identity, split, start=start, end=end))
        if (clip.file, clip.start, clip.end) != (file, start, end):
            raise UserError(f"{where}: the id {identity!r} is taken by another clip of {clip.file}")
        clip.captions += [text for text in (" ".join(str(caption).split()) for caption in captions) if text]
        clip.qa += [
            dict(zip(("question", "answer"), pair, strict=True)) if isinstance(pair, list) else pair
            for pair in row.get("qa") or []
        ]
    if not clips:
        raise UserError(f"{path} lists no clip")
    return list(clips.values())


def prepare_folder(
    videos: Path, annotations: Path, out: Path, *, shard_size: int = 500, progress: bool = True
) -> Report:
    """Writes `out/SPLIT-NNNNNN.tar` for each split, and `out/report.json`. Videos are kept as they are.

    Raises:
        UserError: nothing to read, or nothing that could be written.
    """
    clips = read_table(annotations)
    source = _open_source(videos)
    report = Report()
    if any(out.glob("*.tar")):
        raise UserError(f"{out} holds shards already: give another --out, or remove them")
    with tqdm(total=len(clips), desc="writing shards", unit="clip", disable=not progress) as bar:
        for split in dict.fromkeys(clip.split for clip in clips):
            good = _readable((clip for clip in clips if clip.split == split), source, report, bar)
            count = 0
            for number, part in enumerate(_parts(good, shard_size)):
                count += write_shard(out / f"{split}-{number:06d}.tar", part)
            report.written[split] = count
    if not sum(report.written.values()):
        raise UserError(
            f"none of the {len(clips)} clips of {annotations} is a readable video of {videos} (first: {clips[0].file})"
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report.__dict__, indent=1, ensure_ascii=False))
    return report


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            if path.suffix == ".csv":
                reader = csv.DictReader(stream)
                fields = reader.fieldnames or []
                if "file" not in fields or "caption" not in fields:
                    raise UserError(
                        f"{path}: the header must name `file` and `caption`, not {', '.join(fields) or 'nothing'}"
                    )
                yield from reader
            elif path.suffix == ".json":
                yield from json.load(stream)
            else:
                yield from (json.loads(line) for line in stream if line.strip())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as {path.suffix or 'JSON Lines'}: {error}") from None


class _Source:
    """A folder of videos, found by path or by bare name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()

    def read(self, file: str) -> bytes | None:
        path = (self.folder / file).resolve()
        if not path.is_relative_to(self.folder) or not path.is_file():
            return None
        return path.read_bytes()


class _TarSource(_Source):
    """A tar of videos, read where it lies."""

    def __init__(self, path: Path) -> None:
        self.tar = tarfile.open(path)  # noqa: SIM115, open for as long as this object
        self.members = {member.name.removeprefix("./"): member for member in self.tar if member.isfile()}

    def read(self, file: str) -> bytes | None:
        member = self.members.get(file)
        stream = self.tar.extractfile(member) if member is not None else None
        return stream.read() if stream is not None else None


def _open_source(videos: Path) -> _Source:
    if videos.is_dir():
        return _Source(videos)
    if videos.is_file() and tarfile.is_tarfile(videos):
        return _TarSource(videos)
    raise UserError(f"--videos {videos}: neither a folder nor a tar of videos")


def _readable(
    clips: Iterable[Clip], source: _Source, report: Report, bar: tqdm[Any]
) -> Iterator[tuple[Sample, str, bytes]]:
    for clip in clips:
        bar.update()
        video = source.read(clip.file)
        ending = Path(clip.file).suffix.lstrip(".").lower()
        if video is None or ending not in VIDEO_ENDINGS:
            report.missing.append(clip.file)
            continue
        try:
            decode(video, frames=1, size=32, start=clip.start, end=clip.end)
        except DecodeError as error:
            report.broken.append(f"{clip.file}: {error}")
            continue
        if not clip.captions:
            report.without_caption.append(clip.file)
        yield (
            Sample(
                id=clip.id,
                source="folder",
                split=clip.split,
                captions=clip.captions,
                qa=clip.qa,
                start=clip.start,
                end=clip.end,
            ),
            ending,
            video,
        )


def _parts(items: Iterator[Any], size: int) -> Iterator[Iterator[Any]]:
    """Consecutive runs of `size` items, none of them empty, without holding them in memory."""
    for first in items:
        left = size - 1

        def part(first: Any = first) -> Iterator[Any]:
            nonlocal left
            yield first
            while left and (item := next(items, None)) is not None:
                left -= 1
                yield item

        yield part()
