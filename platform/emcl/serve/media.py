"""Pictures and playable excerpts of indexed videos."""

from __future__ import annotations

import io
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from PIL import Image

from emcl.data.decode import DecodeError, codec, frame_rate, picture, resampled
from emcl.prepare.writer import encode_mp4

THUMBNAIL = 160
"""Pixels of the short side."""
EXCERPT = 480
"""Short side in pixels for excerpts of videos that browsers do not play."""
LONGEST = 60.0
"""Longest excerpt in seconds."""
TYPES = {"mp4": "video/mp4", "m4v": "video/mp4", "mov": "video/mp4", "webm": "video/webm"}
"""File extensions of containers that browsers play."""
CODECS = ("h264", "vp8", "vp9", "av1", "libdav1d", "libvpx-vp9", "libvpx")


def media_type(file: Path) -> str | None:
    """The file's media type if browsers play it, else None."""
    try:
        return _media_type(file, file.stat().st_mtime_ns)
    except (DecodeError, OSError):
        return None


@lru_cache(maxsize=100_000)
def _media_type(file: Path, _changed: int) -> str | None:
    kind = TYPES.get(file.suffix.lstrip(".").lower())
    return kind if kind and codec(file) in CODECS else None


@lru_cache(maxsize=2048)
def thumbnail(file: Path, start: float, end: float) -> bytes:
    """JPEG of the middle frame; about 5 KB each, so the cache takes about 10 MB.

    Raises:
        DecodeError: the file does not decode.
    """
    out = io.BytesIO()
    Image.fromarray(picture(file, start, end, THUMBNAIL)).save(out, "JPEG", quality=80)
    return out.getvalue()


@lru_cache(maxsize=16)
def excerpt(file: Path, start: float, end: float) -> bytes:
    """H.264 in MP4 of [start, end], without sound.

    Raises:
        DecodeError: the file does not decode.
    """
    end = min(end, start + LONGEST)
    rate = min(frame_rate(file) or Fraction(25), Fraction(30))
    return encode_mp4(resampled(file, rate, start=start, end=end), rate, short_side=EXCERPT)
