"""Which parts of a video are embedded by themselves: its scenes, and windows of those that are long."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from emcl.ahead import in_order
from emcl.data.decode import DecodeError, Frames, duration, moving_pictures
from emcl.data.samples import VIDEO_ENDINGS
from emcl.errors import UserError

SHORTEST = 0.8
"""Seconds: a shorter scene belongs to the one before it."""
ENOUGH = 2.0
"""Seconds that a scene is lengthened to, at the expense of its neighbours: models have learnt from clips of some
seconds, and of a shorter one they see too little."""
AHEAD = 32
"""Files whose parts are looked for before they are used."""
SMALL = 96
"""Pixels of the short side that scenes are looked for in."""

Part = tuple[float, float]
"""Start and end, in seconds."""


@dataclass(frozen=True)
class Windows:
    """How videos are cut."""

    length: float = 10.0
    """Seconds of a window."""
    overlap: float = 5.0
    """Seconds that it shares with the next."""
    cut: str = "scenes"
    """`scenes`: at hard cuts first, which takes a look at every frame of files that are longer than half a window;
    `windows`: by time alone."""

    def of(self, seconds: float, start: float = 0.0) -> list[Part]:
        """Start and end of each window from `start`: what is little longer than one is taken whole."""
        if seconds <= 1.5 * self.length:
            return [(start, start + seconds)]
        step = self.length - self.overlap
        count = 1 + max(0, round((seconds - self.length) / step))
        starts = [start + number * step for number in range(count)]
        ends = [begin + self.length for begin in starts[:-1]] + [start + seconds]
        return list(zip(starts, ends, strict=True))

    def of_file(self, path: Path) -> list[Part]:
        """Raises DecodeError where the file says no duration."""
        seconds = duration(path)
        if self.cut == "windows" or seconds <= self.length / 2:
            return self.of(seconds)
        long = [(max(0.0, min(start, end - ENOUGH)), end) for start, end in scenes(path, seconds)]
        long[0] = 0.0, max(long[0][1], min(ENOUGH, seconds))
        return [part for start, end in long for part in self.of(end - start, start)]

    def of_files(self, files: Iterable[Path]) -> Iterator[list[Part] | DecodeError]:
        """Of each file, in order; looked for ahead of their use, by threads."""

        def parts(path: Path) -> list[Part] | DecodeError:
            try:
                return self.of_file(path)
            except DecodeError as error:
                return error

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            yield from in_order((pool.submit(parts, path) for path in files), AHEAD)


def scenes(path: Path, seconds: float) -> list[Part]:
    """The parts of a file between hard cuts, by PySceneDetect's adaptive detector.

    Raises:
        DecodeError: while going through it.
    """
    detector = _detector()
    cuts: list[float] = []
    times: list[float] = []
    for number, (time, frame) in enumerate(moving_pictures(path, SMALL)):
        times.append(time)
        cuts += [times[place] for place in detector(number, frame)]
    inner = sorted({cut for cut in cuts if SHORTEST <= cut <= seconds - SHORTEST})
    kept: list[float] = []
    for cut in inner:
        if not kept or cut - kept[-1] >= SHORTEST:
            kept.append(cut)
    edges = [0.0, *kept, seconds]
    return list(pairwise(edges))


def _detector() -> Callable[[int, Frames], list[int]]:
    """A function of each frame in turn, that returns the numbers of the frames that begin a scene."""
    try:
        from scenedetect import AdaptiveDetector, FrameTimecode
    except ImportError:
        raise UserError("scenes want PySceneDetect: pip install -e '.[search]', or give --cut windows") from None
    detector: Any = AdaptiveDetector()

    def look(number: int, frame: Frames) -> list[int]:
        found = detector.process_frame(FrameTimecode(number, 25.0), np.ascontiguousarray(frame[..., ::-1]))
        return [code.frame_num for code in found]

    return look


def videos_in(folder: Path) -> list[Path]:
    """Every video below a folder, by its file's ending; links that lead outside are left out."""
    root = folder.resolve()
    found = (path for path in folder.rglob("*") if path.suffix.lstrip(".").lower() in VIDEO_ENDINGS)
    return sorted(path for path in found if path.is_file() and path.resolve().is_relative_to(root))
