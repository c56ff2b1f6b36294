"""Decodes a few frames of a video with PyAV."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from emcl.data.data_settings import DataConfig
from emcl.data.frame_shapes import ByFFmpeg, Frames, Shape

LATE = 4.0
"""Seconds: for frames later than this, reading starts with a seek instead of at the video's start."""
ROUNDING = 1e-5
"""Seconds: more than sums of times are off, and far less than a frame lasts."""
REORDERED = 0.5
"""Seconds subtracted from a seek target: seeks may use decoding times, which differ from presentation times by less."""
LONGEST = 24 * 3600.0
"""Seconds; a file that claims a longer duration is damaged."""
CONTAINERS = {"format_whitelist": "mov,matroska,avi,mpeg,mpegvideo,mpegts,asf,flv", "protocol_whitelist": "file"}
"""Formats that FFmpeg may detect, whatever the file name: a playlist would make it open other files and URLs."""


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
    keyframes: bool = False,
    sampling: str = "slices",
    shape: Shape | None = None,
) -> Frames:
    """Up to `frames` frames of [start, end] of the video, by default evenly spread, each as a square.

    [start, end] is cut into equal slices. Each slice gives the frame shown at its middle (with `jitter`, at a random
    time within the slice); with `keyframes`, the last key frame of the slice before that time, if there is one.
    With `fps`, there are at most seconds x fps slices. `sampling="seconds"` takes frames at `fps` instead, without any
    slices (`_every_second`).

    Args:
        shape: makes a square of a frame; by default FFmpeg, of the centre.

    Returns:
        (n, size, size, 3) with 1 <= n <= frames.

    Raises:
        DecodeError: nothing could be decoded.
    """
    with _opened(video) as (container, stream):
        begin, finish = _span(container, stream, start, end)
        begins = None
        if sampling == "seconds":
            assert fps is not None
            goes_on = finish + ROUNDING < sum(_whole(container, stream))
            times = _every_second(begin, finish, frames, fps, goes_on=goes_on)
        else:
            count = frames if fps is None else max(1, min(frames, round((finish - begin) * fps)))
            offsets = jitter.random(count) if jitter is not None else np.full(count, 0.5)
            times = begin + (np.arange(count) + offsets) * (finish - begin) / count
            begins = begin + np.arange(count) * (finish - begin) / count if keyframes else None
        shape = shape or ByFFmpeg(size)
        return np.stack([shape(frame) for frame in _at(container, stream, times, begins)])


def decode_as(
    data: DataConfig,
    video: bytes | Path,
    *,
    start: float | None = None,
    end: float | None = None,
    jitter: np.random.Generator | None = None,
    shape: Shape,
) -> Frames:
    """`decode` by a run's settings."""
    return decode(
        video, frames=data.frames, size=data.image_size, fps=data.fps, start=start, end=end, jitter=jitter,
        keyframes=data.keyframes, sampling=data.sampling, shape=shape,
    )  # fmt: skip


def _every_second(begin: float, finish: float, frames: int, fps: float, *, goes_on: bool) -> NDArray[np.float64]:
    """Times at `fps` from `begin` on; of more than `frames`, as many of them, evenly, the first and the last included.

    Args:
        goes_on: whether the video does after `finish`, so that there is a frame at that very time too.
    """
    periods = (finish - begin) * fps
    count = int(periods + ROUNDING) + 1 if goes_on else max(1, int(np.ceil(periods - ROUNDING)))
    chosen = np.arange(count) if count <= frames else evenly(count, frames, "seconds")
    return begin + chosen / fps + ROUNDING  # or a frame that starts at that very time is missed now and then


def evenly(count: int, frames: int, sampling: str) -> NDArray[np.int64]:
    """Indices of `frames` of `count` frames: the middle of each equal slice, or both ends too (`data.sampling`)."""
    if sampling == "seconds":
        return np.linspace(0, count - 1, frames, dtype=np.int64)
    return ((np.arange(frames) + 0.5) * count / frames).astype(np.int64)


def duration(video: Path) -> float:
    """Duration in seconds, as stated in the file.

    Raises:
        DecodeError: no video, or no duration.
    """
    with _opened(video) as (container, stream):
        begin, finish = _span(container, stream, None, None)
        return finish - begin


def codec(video: Path) -> str:
    """FFmpeg's name of the video codec, such as `h264`.

    Raises:
        DecodeError: no video.
    """
    with _opened(video) as (_, stream):
        return stream.codec_context.name


def frame_rate(video: bytes | Path) -> Fraction | None:
    """Frames per second; None if the file does not state it.

    Raises:
        DecodeError: no video.
    """
    with _opened(video) as (_, stream):
        rate = stream.average_rate  # PyAV 19 has a rational number of its own, which lacks much of Fraction's
        return Fraction(rate.numerator, rate.denominator) if rate else None


def resampled(
    video: bytes | Path, rate: Fraction, *, start: float | None = None, end: float | None = None
) -> Iterator[av.VideoFrame]:
    """Yields the frames of [start, end] at `rate` frames per second, in full size.

    Raises:
        DecodeError: while iterating.
    """
    with _opened(video) as (container, stream):
        begin, finish = _span(container, stream, start, end)
        count = max(1, round((finish - begin) * rate))
        yield from _at(container, stream, begin + (np.arange(count, dtype=np.float64) + 0.5) / float(rate))


def picture(video: Path, start: float, end: float, short_side: int) -> Frames:
    """The middle frame of [start, end], downscaled and not cropped: (height, width, 3).

    Raises:
        DecodeError: nothing could be decoded.
    """
    with _opened(video) as (container, stream):
        begin, finish = _span(container, stream, start, end)
        (frame,) = _at(container, stream, np.array([(begin + finish) / 2]))
        return _small(frame, short_side, VideoReformatter())


def moving_pictures(video: Path, short_side: int) -> Iterator[tuple[float, Frames]]:
    """Yields every frame in order, downscaled and not cropped, with its time in seconds since the first frame.

    Raises:
        DecodeError: while iterating.
    """
    with _opened(video) as (container, stream):
        origin = _span(container, stream, None, None)[0]
        scaler = VideoReformatter()
        for number, frame in enumerate(container.decode(stream)):
            moment = number / float(stream.average_rate or 25) if frame.pts is None else _seconds(frame.pts, stream)
            yield moment - origin, _small(frame, short_side, scaler)


@contextmanager
def _opened(video: bytes | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """Opens a file and its video stream, decoded by one thread: the loader's processes provide the parallelism.

    Raises:
        DecodeError: no video, or any FFmpeg error while it is open.
    """
    try:
        with av.open(
            io.BytesIO(video) if isinstance(video, bytes) else str(video), "r", options=CONTAINERS
        ) as container:
            if not container.streams.video:
                raise DecodeError("no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise DecodeError("FFmpeg does not know how it is coded")
            stream.codec_context.thread_count = 1
            yield container, stream
    except (av.FFmpegError, ValueError) as error:
        # only FFmpeg's message: the full text includes the file name, which may be temporary
        raise DecodeError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


def _span(
    container: av.container.InputContainer, stream: av.VideoStream, start: float | None, end: float | None
) -> tuple[float, float]:
    """Start and end in seconds of the requested interval, on the stream's own time axis."""
    origin, length = _whole(container, stream)
    begin = min(max(start or 0.0, 0.0), length)
    finish = min(end if end is not None else length, length)
    if finish <= begin:
        raise DecodeError(f"the part {start} to {end} s lies outside the {length:.1f} s of the video")
    return origin + begin, origin + finish


def _whole(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[float, float]:
    """The time of the first frame and the length of the video, in seconds."""
    origin = float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0
    if stream.duration and stream.time_base:
        lengths = [float(stream.duration * stream.time_base)]
    elif container.duration:
        lengths = [container.duration / 1_000_000 - origin]  # Matroska's: when the longest stream ends
        if ends := _seconds_said(stream.metadata.get("DURATION", "")):
            lengths.append(ends - origin)
    else:
        raise DecodeError("the file says no duration")
    for length in lengths:
        if not 0 < length <= LONGEST:
            raise DecodeError(f"the file says that it lasts {length:.0f} s")
    return origin, min(lengths)


def _seconds_said(text: str) -> float:
    """Matroska's `00:01:02.500000000`, when a stream ends; 0 for anything else."""
    try:
        hours, minutes, seconds = map(float, text.split(":"))
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds


def _at(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    times: NDArray[np.float64],
    begins: NDArray[np.float64] | None = None,
) -> Iterator[av.VideoFrame]:
    """Yields the frame shown at each of the ascending `times`: the last one that starts no later.

    With `begins`, a key frame that starts between `begins` and the time is taken instead.

    The packets up to the last time are read first; they state when each frame is shown. Then only the necessary packets
    are decoded (`_chosen`). If packets do not state presentation times, or state wrong ones (AVI does not store the
    presentation order, although its video may be reordered), everything is decoded in sequence.
    """
    unit = float(stream.time_base or 0)
    if times[0] > LATE and unit:
        container.seek(int((times[0] - REORDERED) / unit), stream=stream)
    packets: list[av.Packet] = []
    reading = (packet for packet in container.demux(stream) if packet.size)
    for packet in reading:
        packets.append(packet)
        if packet.pts is None or not unit or packet.dts is None or packet.dts * unit > times[-1]:
            break  # all later packets are shown later
    if not packets:
        raise DecodeError("no frame could be decoded")
    moments = [packet.pts for packet in packets if packet.pts is not None]
    believed = not stream.codec_context.has_b_frames or moments != sorted(moments)
    if len(moments) < len(packets) or not unit or not believed:
        yield from _in_sequence(stream, chain(packets, reading), times)
    else:
        yield from _chosen(stream, packets, times, begins)


def _in_sequence(
    stream: av.VideoStream, packets: Iterable[av.Packet], times: NDArray[np.float64]
) -> Iterator[av.VideoFrame]:
    frames = (frame for packet in chain(packets, [None]) for frame in stream.codec_context.decode(packet))
    shown, ahead = None, next(frames, None)
    for moment in times:
        while ahead is not None and (shown is None or _seconds(ahead.pts or 0, stream) <= moment):
            shown, ahead = ahead, next(frames, None)
        if shown is None:
            raise DecodeError("no frame could be decoded")
        yield shown


def _chosen(
    stream: av.VideoStream,
    packets: list[av.Packet],
    times: NDArray[np.float64],
    begins: NDArray[np.float64] | None,
) -> Iterator[av.VideoFrame]:
    """The frames of `times`: after the key frame before each, only reference frames and wanted frames are decoded;
    groups of pictures in between are skipped."""
    decoder = stream.codec_context
    moments = [int(packet.pts or 0) for packet in packets]  # of each packet, in units of stream.time_base
    shown = sorted(pts for pts, packet in zip(moments, packets, strict=True) if not packet.is_discard) or moments[:1]
    seconds = [_seconds(pts, stream) for pts in shown]
    wanted = [shown[max(0, bisect_right(seconds, moment) - 1)] for moment in times]
    index_of = {pts: index for index, pts in enumerate(moments)}
    keys = [index for index, packet in enumerate(packets) if packet.is_keyframe]
    if begins is not None:
        starts = sorted(moments[index] for index in keys)
        wanted = [_key_within(starts, pts, begin, stream) for pts, begin in zip(wanted, begins, strict=True)]
    needed = set(wanted)
    frames: dict[int, av.VideoFrame] = {}
    cursor = 0
    for pts in wanted:
        before = bisect_right(keys, index_of[pts])
        while before and moments[keys[before - 1]] > pts:  # shown later, though decoded earlier
            before -= 1
        start = keys[before - 1] if before else 0
        if begins is not None and pts not in frames and moments[start] == pts:
            frames = {pts: _alone(decoder, packets[start])}
            cursor = -1  # the decoder was flushed
        if pts not in frames and start > cursor:
            decoder.flush_buffers()
            cursor = start
        while pts not in frames and cursor <= len(packets):
            at_end = cursor == len(packets)
            decoder.skip_frame = "DEFAULT" if at_end or moments[cursor] in needed else "NONREF"
            for frame in decoder.decode(None if at_end else packets[cursor]):
                if frame.pts is not None and frame.pts in needed:
                    frames[frame.pts] = frame
            cursor += 1
        if pts in frames:
            frames = {later: frame for later, frame in frames.items() if later >= pts}
        if not frames:
            raise DecodeError("a frame could not be decoded")
        yield frames.get(pts, frames[max(frames)])  # in a truncated file, the last decoded frame


def _key_within(starts: list[int], pts: int, begin: float, stream: av.VideoStream) -> int:
    """The last key frame up to `pts`, if it starts no earlier than `begin` seconds; else `pts`."""
    before = bisect_right(starts, pts)
    return starts[before - 1] if before and _seconds(starts[before - 1], stream) >= begin else pts


def _alone(decoder: av.VideoCodecContext, packet: av.Packet) -> av.VideoFrame:
    """Decodes a key frame, which depends on no other frame."""
    decoder.flush_buffers()
    decoder.skip_frame = "DEFAULT"
    frames = [*decoder.decode(packet), *decoder.decode(None)]
    decoder.flush_buffers()
    if not frames:
        raise DecodeError("a frame could not be decoded")
    return frames[0]


def _seconds(pts: int, stream: av.VideoStream) -> float:
    """A timestamp in seconds; uses the stream's time base because frames flushed at the end have none."""
    unit = stream.time_base or Fraction(0)
    return pts * unit.numerator / unit.denominator


def _small(frame: av.VideoFrame, short_side: int, scaler: VideoReformatter) -> Frames:
    scale = min(1.0, short_side / min(frame.width, frame.height))
    width, height = (max(2, round(side * scale)) for side in (frame.width, frame.height))
    how: dict[str, Any] = {"interpolation": Interpolation.AREA, "threads": 1}
    image: Any = scaler.reformat(frame, width, height, format="rgb24", **how).to_ndarray()
    return image
