"""What loader processes spend their time on, told with each batch."""

from __future__ import annotations

from dataclasses import dataclass

CLEARLY = 0.5
"""The share of the time from which one clip, or reading, is what it was spent on."""


@dataclass(frozen=True)
class LoadingTime:
    """Of some samples, or of one."""

    reading: float = 0.0
    """Seconds in which the shards gave the videos' bytes."""
    decoding: float = 0.0
    slowest: float = 0.0
    """Seconds of the sample that took longest."""
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
        """In words, for a rank that the others wait for."""
        total = self.reading + self.decoding
        if total == 0:
            return ""
        what = "reading shards" if self.reading > CLEARLY * total else "decoding"
        if self.slowest > CLEARLY * total:
            return f"{what}: {self.slowest_id} alone took {self.slowest:.1f} s"
        return f"{what}: {max(self.reading, self.decoding):.1f} s of the loaders' {total:.1f}"
