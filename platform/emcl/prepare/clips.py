"""What every benchmark's reader gives, and what every preparation takes: clips, and a report of what they became."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from emcl.data.samples import QAPair


@dataclass
class Clip:
    """One sample to write."""

    file: str
    """A path inside the folder of videos, a bare name, or a name without its ending (`video7010`)."""
    id: str
    split: str
    captions: list[str] = field(default_factory=list)
    qa: list[QAPair] = field(default_factory=list)
    start: float | None = None
    """Seconds; the part of the file that the clip is, or None for all of it."""
    end: float | None = None
    empty_captions: int = 0
    """Of the published file, left out."""

    def add_captions(self, texts: Iterable[object]) -> None:
        """Adds texts with single spaces; counts those that hold nothing else."""
        for text in texts:
            words = " ".join(str(text).split())
            if words:
                self.captions.append(words)
            else:
                self.empty_captions += 1


@dataclass
class Report:
    """What was written and what was not, and why; `report.json`."""

    written: dict[str, int] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    """Clips whose video is not there."""
    broken: list[str] = field(default_factory=list)
    """Clips that do not decode, with the reason."""
    without_caption: list[str] = field(default_factory=list)
    """Clips that were written though they have no caption and no question."""
    in_several_splits: list[str] = field(default_factory=list)
    """Ids that more than one split holds."""
    unannotated: list[str] = field(default_factory=list)
    """Videos of the folder that no clip names."""
    empty_captions: int = 0
    """Captions of the published files that hold no word, left out."""
