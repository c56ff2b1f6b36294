"""Writes shards: plain WebDataset tars, the same bytes for the same samples, complete or not there at all."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import av
import numpy as np
import webdataset as wds
from numpy.typing import NDArray

from emcl.data.samples import Sample


def write_shard(path: Path, samples: Iterable[tuple[Sample, str, bytes]]) -> int:
    """Writes (sample, file ending, video bytes) to `path`, under a temporary name until it is whole.

    Returns the number of samples.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    count = 0
    try:
        # fixed owner and time, so that the same input gives the same file
        with temporary.open("wb") as stream:
            writer = wds.TarWriter(stream, user="emcl", group="emcl", mtime=0.0, encoder=False)
            for count, (sample, ending, video) in enumerate(samples, 1):  # noqa: B007
                key = sample.id.replace(".", "_").replace("/", "_")  # a dot would end WebDataset's key
                writer.write({"__key__": key, ending: video, "json": sample.to_json()})
            writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def encode_mp4(frames: NDArray[np.uint8], fps: int, *, crf: int = 26) -> bytes:
    """H.264 in MP4 of RGB frames (time, height, width, 3); one thread, so that the bytes are reproducible."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        # x264's fast paths give other bytes by the CPU, and now and then by where its buffers lie
        exact = "cpu-independent=1:lookahead-threads=1"
        stream.options = {"crf": str(crf), "preset": "veryfast", "g": str(fps), "threads": "1", "x264-params": exact}
        for image in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return buffer.getvalue()
