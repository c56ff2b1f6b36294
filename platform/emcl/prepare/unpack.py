"""Unpacks shards to video files and a table, as input for `emcl index` and `emcl prepare folder`."""

from __future__ import annotations

import csv
from pathlib import Path

from tqdm import tqdm

from emcl.data.shards import open_shards
from emcl.errors import UserError
from emcl.prepare.writer import key_of

TABLE = "captions.csv"
_STARTS = (
    (4, b"ftypqt", "mov"),
    (4, b"ftyp", "mp4"),
    (8, b"AVI ", "avi"),
    (0, b"\x1aE\xdf\xa3", "mkv"),
    (0, b"FLV", "flv"),
)
"""Offset of a container's signature, the signature, the file extension."""


def unpack(pattern: str, out: Path, *, progress: bool = True) -> int:
    """Writes `out/ID.mp4` (or another extension) for each sample, and `out/captions.csv`; keeps existing videos.

    Returns the number of samples.

    Raises:
        UserError: no such shards.
    """
    shards = open_shards(pattern)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in tqdm(shards.rows, desc="unpacking", unit="clip", disable=not progress):
        video = shards.read(row)
        file = out / f"{key_of(row.sample.id)}.{_ending(video)}"  # an id may have any characters, including slashes
        if not file.is_file() or file.stat().st_size != len(video):
            temporary = file.with_name(f".{file.name}.part")
            temporary.write_bytes(video)
            temporary.replace(file)
        times = [row.sample.start, row.sample.end]
        lines += [[file.name, caption, row.sample.split, row.sample.id, *times] for caption in row.sample.captions]
    if not shards.rows:
        raise UserError(f"{pattern} holds no samples")
    with (out / TABLE).open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "caption", "split", "id", "start", "end"])
        writer.writerows(lines)
    return len(shards.rows)


def _ending(video: bytes) -> str:
    return next((ending for at, sign, ending in _STARTS if video[at : at + len(sign)] == sign), "mp4")
