"""Video bytes to a few frames, with PyAV."""

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

Frames = NDArray[np.uint8]
"""(time, height, width, 3), RGB."""


LATE = 4.0
"""Seconds into a video from where it is not read from its start."""
REORDERED = 0.5
"""Seconds: a seek may go by the order of decoding, which differs from that of showing by less."""
LONGEST = 24 * 3600.0
"""Seconds; a file that says more is damaged."""
CONTAINERS = {"format_whitelist": "mov,matroska,avi,mpeg,mpegvideo,mpegts,asf,flv", "protocol_whitelist": "file"}
"""What FFmpeg may take a file for, whatever its name: a playlist would make it open other files, and URLs."""


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
) -> Frames:
    """Up to `frames` frames, evenly spread over [start, end] of the video, resized and centre-cropped to a square.

    The part is cut into equal slices and each gives the frame that is shown at its middle (at a random moment of
    the slice with `jitter`), or with `keyframes` the last key frame before that which is in the slice, if there is one.
    With `fps`, a short video gives only as many slices as it has seconds x fps.

    Returns:
        (n, size, size, 3) with 1 <= n <= frames.

    Raises:
        DecodeError: nothing could be decoded.
    """
    with _opened(video) as (container, stream):
        begin, finish = _span(container, stream, start, end)
        count = frames if fps is None else max(1, min(frames, round((finish - begin) * fps)))
        offsets = jitter.random(count) if jitter is not None else np.full(count, 0.5)
        times = begin + (np.arange(count) + offsets) * (finish - begin) / count
        scaler = VideoReformatter()  # kept for all frames: to make one costs more than to use it
        begins = begin + np.arange(count) * (finish - begin) / count if keyframes else None
        return np.stack([square(frame, size, scaler) for frame in _at(container, stream, times, begins)])


def duration(video: Path) -> float:
    """Seconds, as the file says.

    Raises:
        DecodeError: no video, or no duration.
    """
    with _opened(video) as (container, stream):
        begin, finish = _span(container, stream, None, None)
        return finish - begin


def codec(video: Path) -> str:
    """FFmpeg's name of the video's coding, such as `h264`.

    Raises:
        DecodeError: no video.
    """
    with _opened(video) as (_, stream):
        return stream.codec_context.name


def frame_rate(video: bytes | Path) -> Fraction | None:
    """Frames a second, where the file says.

    Raises:
        DecodeError: no video.
    """
    with _opened(video) as (_, stream):
        return stream.average_rate


def resampled(
    video: bytes | Path, rate: Fraction, *, start: float | None = None, end: float | None = None
) -> Iterator[av.VideoFrame]:
    """The frames of [start, end] at `rate` a second, in full size, one at a time.

    Raises:
        DecodeError: while going through them.
    """
    with _opened(video) as (container, stream):
        begin, finish = _span(container, stream, start, end)
        count = max(1, round((finish - begin) * rate))
        yield from _at(container, stream, begin + (np.arange(count, dtype=np.float64) + 0.5) / float(rate))


def picture(video: Path, start: float, end: float, short_side: int) -> Frames:
    """The frame in the middle of a part, made smaller and uncropped: (height, width, 3).

    Raises:
        DecodeError: nothing could be decoded.
    """
    with _opened(video) as (container, stream):
        begin, finish = _span(container, stream, start, end)
        (frame,) = _at(container, stream, np.array([(begin + finish) / 2]))
        return _small(frame, short_side, VideoReformatter())


def moving_pictures(video: Path, short_side: int) -> Iterator[tuple[float, Frames]]:
    """Every frame in order, small and uncropped, with its moment in seconds from the video's first.

    Raises:
        DecodeError: while going through them.
    """
    with _opened(video) as (container, stream):
        origin = _span(container, stream, None, None)[0]
        scaler = VideoReformatter()
        for number, frame in enumerate(container.decode(stream)):
            moment = number / float(stream.average_rate or 25) if frame.pts is None else _seconds(frame.pts, stream)
            yield moment - origin, _small(frame, short_side, scaler)


@contextmanager
def _opened(video: bytes | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its video, decoded by one thread: the loader's processes are the parallelism.

    Raises:
        DecodeError: no video, or anything that FFmpeg does not like of it while it is open.
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
        # FFmpeg's own words: the whole text would name the file, which may be a temporary one
        raise DecodeError(getattr(error, "strerror", None) or str(error) or type(error).__name__) from None


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
    container: av.container.InputContainer,
    stream: av.VideoStream,
    times: NDArray[np.float64],
    begins: NDArray[np.float64] | None = None,
) -> Iterator[av.VideoFrame]:
    """The frame shown at each of the rising `times`: the last one that starts no later.

    With `begins`, a key frame that starts no earlier than that and no later than its time takes its place.

    The packets up to the last of them are read first, and say when each frame is shown; then only what is needed is
    decoded (`_chosen`). Where packets do not say it, or cannot be believed (AVI knows no order of showing, though its
    video may have one), everything is decoded in sequence.
    """
    unit = float(stream.time_base or 0)
    if times[0] > LATE and unit:
        container.seek(int((times[0] - REORDERED) / unit), stream=stream)
    packets: list[av.Packet] = []
    reading = (packet for packet in container.demux(stream) if packet.size)
    for packet in reading:
        packets.append(packet)
        if packet.pts is None or not unit or packet.dts is None or packet.dts * unit > times[-1]:
            break  # the last: what follows is shown later still
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
    """The frames of `times`: from the key frame before each, those are decoded that others are made from, and those
    that are wanted; groups of pictures in between are passed over whole."""
    decoder = stream.codec_context
    moments = [int(packet.pts or 0) for packet in packets]  # each packet's, in the stream's unit
    shown = sorted(pts for pts, packet in zip(moments, packets, strict=True) if not packet.is_discard) or moments[:1]
    seconds = [_seconds(pts, stream) for pts in shown]
    wanted = [shown[max(0, bisect_right(seconds, moment) - 1)] for moment in times]
    place_of = {pts: place for place, pts in enumerate(moments)}
    keys = [place for place, packet in enumerate(packets) if packet.is_keyframe]
    if begins is not None:
        starts = sorted(moments[place] for place in keys)
        wanted = [_key_within(starts, pts, begin, stream) for pts, begin in zip(wanted, begins, strict=True)]
    needed = set(wanted)
    frames: dict[int, av.VideoFrame] = {}
    cursor = 0
    for pts in wanted:
        before = bisect_right(keys, place_of[pts])
        while before and moments[keys[before - 1]] > pts:  # shown later, though decoded earlier
            before -= 1
        start = keys[before - 1] if before else 0
        if begins is not None and pts not in frames and moments[start] == pts:
            frames = {pts: _alone(decoder, packets[start])}
            cursor = -1  # the decoder has forgotten what came before
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
        yield frames.get(pts, frames[max(frames)])  # at a torn end, the last one there is


def _key_within(starts: list[int], pts: int, begin: float, stream: av.VideoStream) -> int:
    """The last key frame up to `pts`, if it starts no earlier than `begin` seconds; else `pts`."""
    before = bisect_right(starts, pts)
    return starts[before - 1] if before and _seconds(starts[before - 1], stream) >= begin else pts


def _alone(decoder: av.VideoCodecContext, packet: av.Packet) -> av.VideoFrame:
    """A key frame, which needs no other."""
    decoder.flush_buffers()
    decoder.skip_frame = "DEFAULT"
    found = [*decoder.decode(packet), *decoder.decode(None)]
    decoder.flush_buffers()
    if not found:
        raise DecodeError("a frame could not be decoded")
    return found[0]


def _seconds(pts: int, stream: av.VideoStream) -> float:
    """A packet's or a frame's moment; frames from a decoder's end know no unit of their own."""
    unit = stream.time_base or Fraction(0)
    return pts * unit.numerator / unit.denominator


def _small(frame: av.VideoFrame, short_side: int, scaler: VideoReformatter) -> Frames:
    scale = min(1.0, short_side / min(frame.width, frame.height))
    width, height = (max(2, round(side * scale)) for side in (frame.width, frame.height))
    how: dict[str, Any] = {"interpolation": Interpolation.AREA, "threads": 1}
    image: Any = scaler.reformat(frame, width, height, format="rgb24", **how).to_ndarray()
    return image


def square(frame: av.VideoFrame, size: int, scaler: VideoReformatter) -> Frames:
    """The frame resized to the short side `size` (bicubic) and centre-cropped: (size, size, 3)."""
    scale = size / min(frame.width, frame.height)
    width, height = max(size, round(frame.width * scale)), max(size, round(frame.height * scale))
    how: dict[str, Any] = {"interpolation": Interpolation.BICUBIC, "threads": 1}  # threads cost more than they give
    scaled = scaler.reformat(frame, width, height, format="rgb24", **how)
    image: Any = scaled.to_ndarray()
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]
