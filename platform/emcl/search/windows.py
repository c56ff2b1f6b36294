"""Long videos as overlapping windows, so that what is found has a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emcl.data.decode import duration
from emcl.data.samples import VIDEO_ENDINGS


@dataclass(frozen=True)
class Windows:
    """How videos are cut."""

    length: float = 10.0
    """Seconds of a window."""
    overlap: float = 5.0
    """Seconds that it shares with the next."""

    def of(self, seconds: float) -> list[tuple[float, float]]:
        """Start and end of each window: a video that is little longer than one is taken whole."""
        if seconds <= 1.5 * self.length:
            return [(0.0, seconds)]
        step = self.length - self.overlap
        count = 1 + max(0, round((seconds - self.length) / step))
        starts = [number * step for number in range(count)]
        ends = [start + self.length for start in starts[:-1]] + [seconds]
        return list(zip(starts, ends, strict=True))

    def of_file(self, path: Path) -> list[tuple[float, float]]:
        """Raises DecodeError where the file says no duration."""
        return self.of(duration(path))


def videos_in(folder: Path) -> list[Path]:
    """Every video below a folder, by its file's ending; links that lead outside are left out."""
    root = folder.resolve()
    found = (path for path in folder.rglob("*") if path.suffix.lstrip(".").lower() in VIDEO_ENDINGS)
    return sorted(path for path in found if path.is_file() and path.resolve().is_relative_to(root))
