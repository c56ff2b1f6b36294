"""Video bytes to a few frames, with PyAV."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""(time, height, width, 3), RGB."""


REORDERED = 0.5
"""Seconds: an index goes by the order of decoding, a moment by that of showing; they differ by less."""
JUMP, GUESSED = 1.0, 4.0
"""Seconds that a jump must save, with an index and without: the decoder starts anew."""
LONGEST = 24 * 3600.0
"""Seconds; a file that says more is damaged."""


class DecodeError(Exception):
    """The video cannot be read."""


def decode(
    video: bytes | Path,
    *,
    frames: int,
    size: int,
    fps: float | None = None,
    start: float | None = None,
    end: float | None = None,
    jitter: np.random.Generator | None = None,
) -> Frames:
    """Up to `frames` frames, evenly spread over [start, end] of the video, resized and centre-cropped to a square.

    The part is cut into equal slices and each gives the frame that is shown at its middle (at a random moment of
    the slice with `jitter`). With `fps`, a short video gives only as many slices as it has seconds x fps.

    Returns:
        (n, size, size, 3) with 1 <= n <= frames.

    Raises:
        DecodeError: nothing could be decoded.
    """
    try:
        with av.open(io.BytesIO(video) if isinstance(video, bytes) else str(video), "r") as container:
            if not container.streams.video:
                raise DecodeError("no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"  # the loader's processes are the parallelism
            begin, finish = _span(container, stream, start, end)
            count = frames if fps is None else max(1, min(frames, round((finish - begin) * fps)))
            offsets = jitter.random(count) if jitter is not None else np.full(count, 0.5)
            times = begin + (np.arange(count) + offsets) * (finish - begin) / count
            return np.stack([square(frame, size) for frame in _at(container, stream, times)])
    except (av.FFmpegError, ValueError, StopIteration) as error:
        raise DecodeError(str(error) or type(error).__name__) from None


def frame_rate(video: bytes) -> Fraction | None:
    """Frames a second, where the file says.

    Raises:
        DecodeError: no video.
    """
    try:
        with av.open(io.BytesIO(video), "r") as container:
            if not container.streams.video:
                raise DecodeError("no video stream")
            return container.streams.video[0].average_rate
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError(str(error) or type(error).__name__) from None


def resampled(
    video: bytes, rate: Fraction, *, start: float | None = None, end: float | None = None
) -> Iterator[av.VideoFrame]:
    """The frames of [start, end] at `rate` a second, in full size, one at a time.

    Raises:
        DecodeError: while going through them.
    """
    try:
        with av.open(io.BytesIO(video), "r") as container:
            stream = container.streams.video[0]
            stream.thread_type = "SLICE"
            begin, finish = _span(container, stream, start, end)
            count = max(1, round((finish - begin) * rate))
            yield from _at(container, stream, begin + (np.arange(count, dtype=np.float64) + 0.5) / float(rate))
    except (av.FFmpegError, ValueError) as error:
        raise DecodeError(str(error) or type(error).__name__) from None


def _span(
    container: av.container.InputContainer, stream: av.VideoStream, start: float | None, end: float | None
) -> tuple[float, float]:
    """Seconds of the part to take, counted from the video's own first moment."""
    origin = float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0
    if stream.duration and stream.time_base:
        length = float(stream.duration * stream.time_base)
    elif container.duration:
        length = container.duration / 1_000_000
    else:
        raise DecodeError("the file says no duration")
    if not 0 < length <= LONGEST:
        raise DecodeError(f"the file says that it lasts {length:.0f} s")
    begin = min(max(start or 0.0, 0.0), length)
    finish = min(end if end is not None else length, length)
    if finish <= begin:
        raise DecodeError(f"the part {start} to {end} s lies outside the {length:.1f} s of the video")
    return origin + begin, origin + finish


def _at(
    container: av.container.InputContainer, stream: av.VideoStream, times: NDArray[np.float64]
) -> Iterator[av.VideoFrame]:
    """The frame shown at each of the rising `times`: the last one that starts no later.

    Between two of them the file is read on, or left for a key frame that lies in between (`_KeyFrames`).
    """
    keys = _KeyFrames(stream)
    shown: av.VideoFrame | None = None
    frames, ahead, position = container.decode(stream), None, 0.0
    for moment in times:
        key = keys.worth_a_jump(position, float(moment))
        if key is not None:
            container.seek(key, stream=stream)
            frames, shown, ahead = container.decode(stream), None, None
        if ahead is None:
            ahead = next(frames, None)
        while ahead is not None and (shown is None or _seconds(ahead) <= moment):
            shown, ahead = ahead, next(frames, None)
        if shown is None:
            raise DecodeError("no frame could be decoded")
        position = _seconds(shown)
        yield shown


def _seconds(frame: av.VideoFrame) -> float:
    return frame.time if frame.time is not None else 0.0


class _KeyFrames:
    """Where decoding can start, by the file's own index; in MP4 and AVI it is at its head or tail."""

    def __init__(self, stream: av.VideoStream) -> None:
        self.unit = float(stream.time_base or 0)
        self.times = [entry.timestamp for entry in stream.index_entries if entry.is_keyframe] if self.unit else []

    def worth_a_jump(self, position: float, moment: float) -> int | None:
        """The key frame to read on from, in the stream's unit; None where reading on is no longer way."""
        if not self.unit:
            return None
        if not self.times:  # without an index a jump is a guess, and pays over long ways alone
            return int((moment - REORDERED) / self.unit) if moment - position > GUESSED else None
        place = bisect_right(self.times, (moment - REORDERED) / self.unit) - 1
        if place < 0 or self.times[place] * self.unit < position + JUMP:
            return None
        return int(self.times[place])


def square(frame: av.VideoFrame, size: int) -> Frames:
    """The frame resized to the short side `size` (bicubic) and centre-cropped: (size, size, 3)."""
    scale = size / min(frame.width, frame.height)
    width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
    image: Any = frame.reformat(width, height, format="rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]
