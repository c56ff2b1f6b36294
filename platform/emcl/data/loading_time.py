"""How loader processes spend their time; sent with each batch."""

from __future__ import annotations

from dataclasses import dataclass

CLEARLY = 0.5
"""A clip, or reading, is named as the cause if it took more than this share of the time."""


@dataclass(frozen=True)
class LoadingTime:
    """Loading time of one or several samples."""

    reading: float = 0.0
    """Seconds spent reading the videos' bytes from shards."""
    decoding: float = 0.0
    slowest: float = 0.0
    """Seconds of the slowest sample."""
    slowest_id: str = ""

    @staticmethod
    def of_sample(name: str, reading: float, decoding: float) -> LoadingTime:
        return LoadingTime(reading, decoding, reading + decoding, name)

    def __add__(self, other: LoadingTime) -> LoadingTime:
        longer = max(self, other, key=lambda one: one.slowest)
        return LoadingTime(
            self.reading + other.reading, self.decoding + other.decoding, longer.slowest, longer.slowest_id
        )

    def detail(self) -> str:
        """A short text on the main cause, for a rank that the others wait for."""
        total = self.reading + self.decoding
        if total == 0:
            return ""
        what = "reading shards" if self.reading > CLEARLY * total else "decoding"
        if self.slowest > CLEARLY * total:
            return f"{what}: {self.slowest_id} alone took {self.slowest:.1f} s"
        return f"{what}: {max(self.reading, self.decoding):.1f} s of the loaders' {total:.1f}"
