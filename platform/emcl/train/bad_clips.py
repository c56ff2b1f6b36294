"""Clips that fail to decode in training: logged once each, counted over all ranks; too many end the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from emcl.data.bad_samples import check_bad_fraction
from emcl.disk import write_whole
from emcl.distributed import Ranks


class BadClips:
    """The distinct bad clips of all ranks so far; a resumed run continues the count."""

    def __init__(self, ranks: Ranks, listed: Path, samples: int, max_bad_fraction: float, damaged: list[str]) -> None:
        """`samples`: size of the training split; `damaged`: samples lost in damaged shards, the same on every rank.

        Args:
            listed: file that lists all bad clips, one per line.
        """
        self.ranks, self.path, self.allowed = ranks, listed, max_bad_fraction
        self.total = samples + len(damaged)
        kept = self.path.read_text().splitlines() if ranks.first and self.path.is_file() else []
        self.names = {*damaged, *ranks.gather_objects(kept)[0]}
        self.new: list[str] = []
        """Bad clips of this rank that the other ranks do not know yet."""
        if ranks.first:
            for item in damaged:
                tqdm.write(f"left out: {item}")

    def __len__(self) -> int:
        return len(self.names)

    def add(self, names: Iterable[str]) -> None:
        """Adds bad clips of this rank; no communication."""
        for name in names:
            if name not in self.names and name not in self.new:
                self.new.append(name)
                tqdm.write(f"does not decode, another clip is taken: {name}")

    def exchange(self) -> None:
        """Shares the new clips with all ranks; called by all ranks if any has new ones.

        Raises:
            UserError: more bad clips than allowed.
        """
        self.names |= {name for names in self.ranks.gather_objects(self.new) for name in names}
        self.new = []
        if self.ranks.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(f"{name}\n" for name in sorted(self.names)))
        what, where = "clips are damaged or do not decode", f" (all of them in {self.path})"
        check_bad_fraction(sorted(self.names), self.total, self.allowed, what, where=where)
