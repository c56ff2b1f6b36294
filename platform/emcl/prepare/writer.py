"""Writes shards: plain WebDataset tars, atomically, with the same bytes for the same samples."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from emcl.data.samples import Sample


def write_shard(path: Path, samples: Iterable[tuple[Sample, str, bytes]]) -> int:
    """Writes (sample, file extension, video bytes) to `path`, under a temporary name until it is complete.

    Returns the number of samples.
    """
    import webdataset as wds  # here, because it imports PyTorch, which processes that only encode do not need

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    count = 0
    try:
        # fixed owner and time, so that the same input gives the same file
        with temporary.open("wb") as stream:
            writer = wds.TarWriter(stream, user="emcl", group="emcl", mtime=0.0, encoder=False)
            for count, (sample, ending, video) in enumerate(samples, 1):  # noqa: B007
                writer.write({"__key__": key_of(sample.id), ending: video, "json": sample.to_json()})
            writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def key_of(identity: str) -> str:
    """An id as a WebDataset key, with dots escaped because a dot ends the key; different ids give different keys."""
    for sign in "%./":
        identity = identity.replace(sign, f"%{ord(sign):02X}")
    return identity


def encode_mp4(
    frames: Iterable[NDArray[np.uint8] | av.VideoFrame],
    fps: int | Fraction,
    *,
    crf: int = 26,
    short_side: int | None = None,
    key_every: int | None = None,
) -> bytes:
    """Encodes RGB frames (height, width, 3) or decoded frames as H.264 in MP4; one thread, for reproducible bytes.

    Args:
        short_side: larger frames are scaled down to it.
        key_every: key-frame interval in frames; one second if not given.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream: av.VideoStream | None = None
        scaler = VideoReformatter()  # of one thread: those of a frame's own may be of a process that has been forked
        for number, item in enumerate(frames):
            frame = item if isinstance(item, av.VideoFrame) else av.VideoFrame.from_ndarray(item, format="rgb24")
            if stream is None:
                stream = _h264(container, frame, fps, crf, short_side, key_every)
            frame = scaler.reformat(frame, stream.width, stream.height, format="yuv420p", threads=1)
            frame.pts, frame.time_base, frame.pict_type = number, 1 / Fraction(fps), PictureType.NONE
            for packet in stream.encode(frame):
                container.mux(packet)
        if stream is None:
            raise ValueError("no frame to encode")
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()


def encode_mov(frames: Iterable[NDArray[np.uint8]], fps: int | Fraction, *, quality: int | None = None) -> bytes:
    """Encodes RGB frames (height, width, 3) separately in a QuickTime container: JPEG, or raw without `quality`.

    The result is a normal video file with timestamps, read like any other; decoding a frame is very cheap.
    The same input gives the same bytes.

    Args:
        quality: JPEG quality, on libjpeg's scale of 1 to 95.
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mov", options={"fflags": "+bitexact"}) as container:
        packets = _raw(container, frames, fps) if quality is None else _jpegs(container, frames, fps, quality)
        number = -1
        for number, packet in enumerate(packets):  # noqa: B007
            container.mux(packet)
        if number < 0:
            raise ValueError("no frame to encode")
    return buffer.getvalue()


def _raw(
    container: av.container.OutputContainer, frames: Iterable[NDArray[np.uint8]], fps: int | Fraction
) -> Iterator[av.Packet]:
    stream: av.VideoStream | None = None
    for number, image in enumerate(frames):
        if stream is None:
            stream = container.add_stream("rawvideo", rate=fps)
            stream.height, stream.width = image.shape[:2]
            stream.pix_fmt = "rgb24"
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = number, 1 / Fraction(fps)
        yield from stream.encode(frame)
    if stream is not None:
        yield from stream.encode()


def _jpegs(
    container: av.container.OutputContainer, frames: Iterable[NDArray[np.uint8]], fps: int | Fraction, quality: int
) -> Iterator[av.Packet]:
    """JPEG packets by libjpeg: FFmpeg's encoder makes grey one level too dark and slightly green."""
    stream: Any = None
    for number, image in enumerate(frames):
        if stream is None:
            stream = container.add_mux_stream("mjpeg", rate=Fraction(fps), width=image.shape[1], height=image.shape[0])
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        packet = av.Packet(file.getvalue())
        packet.stream, packet.is_keyframe, packet.time_base = stream, True, 1 / Fraction(fps)
        packet.pts = packet.dts = number
        packet.duration = 1
        yield packet


def _h264(
    container: av.container.OutputContainer,
    frame: av.VideoFrame,
    fps: int | Fraction,
    crf: int,
    short_side: int | None,
    key_every: int | None,
) -> av.VideoStream:
    stream = container.add_stream("libx264", rate=fps)
    scale = min(1.0, short_side / min(frame.width, frame.height)) if short_side else 1.0
    stream.width, stream.height = (max(2, 2 * round(side * scale / 2)) for side in (frame.width, frame.height))
    stream.pix_fmt = "yuv420p"
    stream.codec_context.thread_count = 1
    # x264's fast paths give different bytes on different CPUs, and sometimes for different buffer addresses
    exact = "cpu-independent=1:lookahead-threads=1"
    group = str(key_every or max(1, round(fps)))
    stream.options = {"crf": str(crf), "preset": "veryfast", "g": group, "threads": "1", "x264-params": exact}
    return stream
