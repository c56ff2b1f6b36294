"""Samples a second on one and two processes under each ZeRO stage, and the bytes that a step sends.

Real steps of the sample recipe (`scaling_rank.py`, started as the launcher starts ranks), one thread a process, the
global batch fixed at 64; a repeat's figure is the median of four steps. What is counted are the bytes that each rank
gives to collectives in one step; the fewest possible are one reduction of the gradients and one gathering of each
rank's texts and frames, there and back.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from local_ranks import start_ranks
from sample_clips import sample_clips
from timing import Row, compared, script

HERE = Path(__file__).resolve().parent
STAGES = ("0", "1", "2", "3")


def run(folder: Path, clips: str, ranks: int, stages: str) -> dict[str, Any]:
    """Samples a second and bytes a step of rank 0, by stage."""
    out = folder / f"{ranks}.json"
    command = [sys.executable, str(HERE / "scaling_rank.py"), str(folder), clips, stages, str(out)]
    processes = start_ranks(
        command,
        ranks,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    for process in processes:
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: {said.decode()[-2000:]}")
    return dict(json.loads(out.read_text()))


def measure(repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name, sample_clips() as clips:
        folder = Path(name)
        rates: dict[str, list[float]] = {}
        for _ in range(repeats):
            one, two = run(folder, clips, 1, "1"), run(folder, clips, 2, ",".join(STAGES))
            rates.setdefault("one process", []).append(one["samples_per_second"]["1"])
            for stage in STAGES:
                rates.setdefault(f"ZeRO-{stage}", []).append(two["samples_per_second"][stage])
    targets = {"one process": ">= 1.6"}
    rows = [compared("scaling", "two processes", "samples/s", rates, ours="ZeRO-1", targets=targets)]
    for stage in STAGES:
        fewest = {"the fewest": two["fewest"] / 2**20}
        rows.append(Row("scaling", f"sent a step, ZeRO-{stage}", "MiB", two["sent"][stage] / 2**20, fewest, None))
    return rows


if __name__ == "__main__":
    script(__doc__, measure, "scaling")
