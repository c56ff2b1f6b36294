"""Which rank the others wait for, and what it spends the time on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emcl.train.step_clock import PARTS

SHARE = 0.25
"""Share of the time between two reports that a rank must cost the others before it is reported."""
FLOOR = 0.05
"""Least such cost in seconds: below it, noise is a large share on any machine."""
USUAL = 0.25
"""The quantile of the other ranks that is taken as the usual time: a disk may be slow for half of them."""


@dataclass(frozen=True)
class Straggler:
    """A rank that costs the others time."""

    rank: int
    part: str
    """One of `PARTS`."""
    excess: float
    """Seconds since the last report that it worked longer than is usual."""

    def line(self, seconds: float, steps: int, detail: str) -> str:
        """For the log; `seconds` and `steps` since the last report."""
        what = f"{self.part} ({detail})" if detail else self.part
        return f"the others wait for rank {self.rank}: {what} costs {self.excess:.1f} of {seconds:.1f} s, {steps} steps"


def find_straggler(work_RP: NDArray[np.float64], seconds: float) -> Straggler | None:
    """The rank that the others wait for, if any.

    Args:
        work_RP: seconds that each rank has worked on each of `PARTS`, waiting left out.
        seconds: since the last report.
    """
    if len(work_RP) < 2:
        return None
    total_R = work_RP.sum(1)
    rank = int(total_R.argmax())
    others_RP = np.delete(work_RP, rank, 0)
    excess = float(total_R[rank] - np.quantile(others_RP.sum(1), USUAL))
    if excess < max(SHARE * seconds, FLOOR):
        return None
    by_part_P = work_RP[rank] - np.quantile(others_RP, USUAL, axis=0)
    return Straggler(rank, PARTS[int(by_part_P.argmax())], excess)
