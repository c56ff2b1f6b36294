"""Locates clips' videos in a folder or tar, and re-encodes them for training."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath

from emcl.data.decode import frame_rate, resampled
from emcl.data.frame_shapes import ByFFmpeg
from emcl.data.samples import VIDEO_ENDINGS
from emcl.errors import UserError
from emcl.prepare.writer import encode_mov, encode_mp4

KEY_EVERY = 4
"""Key-frame interval of re-encoded videos, in frames."""


@dataclass(frozen=True)
class Place:
    """Where a video's bytes are: a file, or a byte range of one."""

    path: Path
    name: str
    size: int
    offset: int = 0

    @property
    def ending(self) -> str:
        return PurePosixPath(self.name).suffix.lstrip(".").lower()

    def read(self) -> bytes:
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


class Videos:
    """The videos of a folder (with subfolders) or of a tar, found by path, by name, or by name without extension.

    Raises:
        UserError: `where` is neither a folder nor a tar.
    """

    def __init__(self, where: Path) -> None:
        if where.is_dir():
            locations = _of_folder(where)
        elif where.is_file() and tarfile.is_tarfile(where):
            locations = _of_tar(where)
        else:
            raise UserError(f"--videos {where}: neither a folder nor a tar of videos")
        self.places = {location.name: location for location in locations if location.ending in VIDEO_ENDINGS}
        self._by_name: dict[str, Place] = {}
        for name in sorted(self.places, reverse=True):  # if several have the same name, the first by path wins
            location, path = self.places[name], PurePosixPath(name)
            self._by_name[path.stem] = self._by_name[path.name] = location

    def find(self, file: str) -> Place | None:
        """The video of this path, name or stem; never one outside the folder."""
        exact = self.places.get(str(PurePosixPath(file)))
        if exact or "/" in file:
            return exact
        return self._by_name.get(file) or self._by_name.get(f"v_{file}") or self._by_name.get(file.removeprefix("v_"))


def _of_folder(folder: Path) -> list[Place]:
    root = folder.resolve()
    return [
        Place(path, path.relative_to(root).as_posix(), path.stat().st_size)
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.resolve().is_relative_to(root)
    ]


def _of_tar(path: Path) -> list[Place]:
    try:
        with tarfile.open(path, "r:") as tar:
            return [
                Place(path.resolve(), member.name.removeprefix("./"), member.size, member.offset_data)
                for member in tar
                if member.isfile()
            ]
    except tarfile.TarError as error:
        raise UserError(f"--videos {path}: no plain tar ({error}); unpack it to a folder first") from None


def reencode(
    video: bytes, *, short_side: int, fps: float, start: float | None = None, end: float | None = None
) -> bytes:
    """Encodes [start, end] as H.264 in MP4, with a key frame every KEY_EVERY frames.

    `short_side` and `fps` are upper limits: videos are never upscaled, and no frame is duplicated. The same input gives
    the same bytes.

    Raises:
        DecodeError: nothing could be decoded.
    """
    rate = _rate(video, fps)
    return encode_mp4(resampled(video, rate, start=start, end=end), rate, short_side=short_side, key_every=KEY_EVERY)


def as_frames(
    video: bytes, *, size: int, fps: float, quality: int | None, start: float | None = None, end: float | None = None
) -> bytes:
    """Encodes [start, end] as square frames (JPEG or raw) that training with `data.image_size` = `size` uses unchanged.

    Args:
        quality: JPEG quality; None for raw.

    Raises:
        DecodeError: nothing could be decoded.
    """
    rate = _rate(video, fps)
    frames = map(ByFFmpeg(size), resampled(video, rate, start=start, end=end))
    return encode_mov(frames, rate, quality=quality)


def _rate(video: bytes, fps: float) -> Fraction:
    return min(Fraction(fps).limit_denominator(1000), frame_rate(video) or Fraction(fps))
