"""Video bytes to a few frames, with PyAV."""

from __future__ import annotations

import io
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
    begin = min(max(start or 0.0, 0.0), length)
    finish = min(end if end is not None else length, length)
    if finish <= begin:
        raise DecodeError(f"the part {start} to {end} s lies outside the {length:.1f} s of the video")
    return origin + begin, origin + finish


def _at(
    container: av.container.InputContainer, stream: av.VideoStream, times: NDArray[np.float64]
) -> Iterator[av.VideoFrame]:
    """The frame shown at each of the rising `times`: the last one that starts no later."""
    if times[0] > 4.0 and stream.time_base:
        container.seek(int((times[0] - 0.5) / stream.time_base), stream=stream)
    shown: av.VideoFrame | None = None
    wanted = list(times)
    for frame in container.decode(stream):
        now = frame.time if frame.time is not None else 0.0
        while wanted and now > wanted[0] and shown is not None:
            yield shown
            wanted.pop(0)
        if not wanted:
            return
        shown = frame
    if shown is None:
        raise DecodeError("no frame could be decoded")
    for _ in wanted:
        yield shown


def square(frame: av.VideoFrame, size: int) -> Frames:
    """The frame resized to the short side `size` (bicubic) and centre-cropped: (size, size, 3)."""
    scale = size / min(frame.width, frame.height)
    width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
    image: Any = frame.reformat(width, height, format="rgb24", interpolation=Interpolation.BICUBIC).to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]
