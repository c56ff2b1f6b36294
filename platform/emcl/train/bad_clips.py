"""The clips that do not decode while training: named once, counted over all ranks, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from emcl.data.bad import check_bad_fraction
from emcl.disk import write_whole
from emcl.distributed import Ranks


class BadClips:
    """Distinct bad clips of all ranks so far; a resumed run goes on counting."""

    def __init__(self, ranks: Ranks, listed: Path, samples: int, max_bad_fraction: float, damaged: list[str]) -> None:
        """`samples` of the training split; `damaged` are those that its shards lost, which every rank knows.

        Args:
            listed: the file of all of them, a line each.
        """
        self.ranks, self.path, self.allowed = ranks, listed, max_bad_fraction
        self.total = samples + len(damaged)
        kept = self.path.read_text().splitlines() if ranks.first and self.path.is_file() else []
        self.names = {*damaged, *ranks.gather_objects(kept)[0]}
        self.new: list[str] = []
        """Of this rank, and not yet told to others."""
        if ranks.first:
            for item in damaged:
                tqdm.write(f"left out: {item}")

    def __len__(self) -> int:
        return len(self.names)

    def add(self, names: Iterable[str]) -> None:
        """What this rank has found; no communication."""
        for name in names:
            if name not in self.names and name not in self.new:
                self.new.append(name)
                tqdm.write(f"does not decode, another clip is taken: {name}")

    def exchange(self) -> None:
        """Tells all ranks; called by all where any has something new.

        Raises:
            UserError: more than are allowed.
        """
        self.names |= {name for names in self.ranks.gather_objects(self.new) for name in names}
        self.new = []
        if self.ranks.first:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, "".join(f"{name}\n" for name in sorted(self.names)))
        what, where = "clips are damaged or do not decode", f" (all of them in {self.path})"
        check_bad_fraction(sorted(self.names), self.total, self.allowed, what, where=where)
