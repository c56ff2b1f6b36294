"""Clips, which benchmark readers return and `prepare_shards` takes, and the report on the result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from emcl.data.samples import QAPair


@dataclass
class Clip:
    """One sample to write."""

    file: str
    """A path inside the folder of videos, a bare name, or a name without extension (`video7010`)."""
    id: str
    split: str
    captions: list[str] = field(default_factory=list)
    qa: list[QAPair] = field(default_factory=list)
    start: float | None = None
    """Seconds; where the clip starts in the file, or None for the file's start."""
    end: float | None = None
    empty_captions: int = 0
    """Number of empty captions in the published file; they are dropped."""

    def add_captions(self, texts: Iterable[object]) -> None:
        """Adds texts with normalised spaces; counts the empty ones."""
        for text in texts:
            words = " ".join(str(text).split())
            if words:
                self.captions.append(words)
            else:
                self.empty_captions += 1


@dataclass
class Report:
    """What was written, and what was not and why; saved as `report.json`."""

    written: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Clips whose video is missing."""
    broken: list[str] = field(default_factory=list)
    """Clips that do not decode, with the reason."""
    without_caption: list[str] = field(default_factory=list)
    """Clips that were written although they have no caption and no question."""
    in_several_splits: list[str] = field(default_factory=list)
    """Ids that occur in more than one split."""
    unannotated: list[str] = field(default_factory=list)
    """Videos in the folder that no clip refers to."""
    empty_captions: int = 0
    """Empty captions in the published files; they are dropped."""
