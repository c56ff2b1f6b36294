"""Cuts a video into the intervals that are embedded separately: scenes, and windows of long scenes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from emcl.data.decode import DecodeError, duration, moving_pictures
from emcl.data.frame_shapes import Frames
from emcl.data.samples import VIDEO_ENDINGS
from emcl.errors import UserError
from emcl.prefetch import in_order

SHORTEST = 0.8
"""Seconds: a shorter scene is merged into the one before it."""
ENOUGH = 2.0
"""Minimum length in seconds: shorter scenes are extended into their neighbours, because models were trained on clips of
several seconds and see too little of shorter ones."""
AHEAD = 32
"""Number of files that are cut ahead of their use."""
SMALL = 96
"""Short side in pixels for scene detection."""

Part = tuple[float, float]
"""Start and end, in seconds."""


@dataclass(frozen=True)
class Windows:
    """How videos are cut."""

    length: float = 10.0
    """Seconds of a window."""
    overlap: float = 5.0
    """Seconds shared by consecutive windows."""
    cut: str = "scenes"
    """`scenes`: first at hard cuts, which decodes every frame of files longer than half a window;
    `windows`: only by time."""

    def of(self, seconds: float, start: float = 0.0) -> list[Part]:
        """Start and end of each window from `start`; up to 1.5 window lengths are one window."""
        if seconds <= 1.5 * self.length:
            return [(start, start + seconds)]
        step = self.length - self.overlap
        count = 1 + max(0, round((seconds - self.length) / step))
        starts = [start + number * step for number in range(count)]
        ends = [begin + self.length for begin in starts[:-1]] + [start + seconds]
        return list(zip(starts, ends, strict=True))

    def of_file(self, path: Path) -> list[Part]:
        """Start and end of each window of a file. Raises DecodeError if it has no duration or does not decode."""
        seconds = duration(path)
        if self.cut == "windows" or seconds <= self.length / 2:
            return self.of(seconds)
        long = [(max(0.0, min(start, end - ENOUGH)), end) for start, end in scenes(path, seconds)]
        long[0] = 0.0, max(long[0][1], min(ENOUGH, seconds))
        return [window for start, end in long for window in self.of(end - start, start)]

    def of_files(self, files: Iterable[Path]) -> Iterator[list[Part] | DecodeError]:
        """Windows of each file, in order; computed ahead of their use by threads."""

        def cut_file(path: Path) -> list[Part] | DecodeError:
            try:
                return self.of_file(path)
            except DecodeError as error:
                return error

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            yield from in_order((pool.submit(cut_file, path) for path in files), AHEAD)


def scenes(path: Path, seconds: float) -> list[Part]:
    """The intervals of a file between hard cuts, by PySceneDetect's adaptive detector.

    Raises:
        DecodeError: the file does not decode.
    """
    detector = _detector()
    cuts: list[float] = []
    times: list[float] = []
    for number, (time, frame) in enumerate(moving_pictures(path, SMALL)):
        times.append(time)
        cuts += [times[frame_number] for frame_number in detector(number, frame)]
    inner = sorted({cut for cut in cuts if SHORTEST <= cut <= seconds - SHORTEST})
    kept: list[float] = []
    for cut in inner:
        if not kept or cut - kept[-1] >= SHORTEST:
            kept.append(cut)
    edges = [0.0, *kept, seconds]
    return list(pairwise(edges))


def _detector() -> Callable[[int, Frames], list[int]]:
    """Returns a function to call with each frame in turn; it returns the numbers of frames that start a scene."""
    try:
        from scenedetect import AdaptiveDetector, FrameTimecode
    except ImportError:
        raise UserError("scenes want PySceneDetect: pip install -e '.[search]', or give --cut windows") from None
    detector: Any = AdaptiveDetector()

    def look(number: int, frame: Frames) -> list[int]:
        cuts = detector.process_frame(FrameTimecode(number, 25.0), np.ascontiguousarray(frame[..., ::-1]))
        return [code.frame_num for code in cuts]

    return look


def videos_in(folder: Path) -> list[Path]:
    """All videos below a folder, by file extension; links to outside the folder are skipped."""
    root = folder.resolve()
    paths = (path for path in folder.rglob("*") if path.suffix.lstrip(".").lower() in VIDEO_ENDINGS)
    return sorted(path for path in paths if path.is_file() and path.resolve().is_relative_to(root))
