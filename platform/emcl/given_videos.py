"""A video as a user gives it: a file, a part of one, or its frames; to the frames that a model takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from torch import Tensor

from emcl.data.data_settings import DataConfig
from emcl.data.decode import DecodeError, decode_as, evenly
from emcl.data.frame_shapes import evaluated_shape
from emcl.errors import UserError


class VideoError(UserError):
    """A file that does not decode."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} does not decode: {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Span:
    """A part of a file."""

    path: Path
    start: float | None = None
    """Seconds; from the file's start to its end where not given."""
    end: float | None = None


Video = str | Path | Span | np.ndarray | Tensor
"""A file or a part of one, or its frames (time, height, width, 3) uint8."""


def frames_of_given(video: Video, data: DataConfig) -> np.ndarray:
    """(n, H, W, 3) uint8, `data.frames` of them at most, as an evaluation sees them.

    Raises:
        UserError: no such file, one that does not decode (`VideoError`), or frames of another shape or type.
    """
    shape = evaluated_shape(data)
    if isinstance(video, (str, Path, Span)):
        span = video if isinstance(video, Span) else Span(Path(video))
        if not span.path.is_file():
            raise UserError(f"{span.path}: no such file")
        try:
            return decode_as(data, span.path, start=span.start, end=span.end, shape=shape)
        except DecodeError as error:
            raise VideoError(span.path, str(error)) from None
    frames = video.cpu().numpy() if isinstance(video, Tensor) else np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise UserError(f"frames are (time, height, width, 3) uint8, not {frames.shape} {frames.dtype}")
    chosen = frames
    if len(frames) > data.frames:
        chosen = frames[evenly(len(frames), data.frames, data.sampling)]
    return np.stack([shape(av.VideoFrame.from_ndarray(frame, format="rgb24")) for frame in chosen])
