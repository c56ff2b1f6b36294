"""Samples per second with one and two processes under each ZeRO stage, and the bytes sent per step.

Real steps of the sample recipe (`scaling_rank.py`, started as the launcher starts ranks), one thread per process,
global batch 64; a repeat's figure is the median of four steps. Bytes are those that each rank passes to collectives in
one step. The minimum is one reduction of the gradients, and one gather of each rank's texts and frames in forward and
backward.
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
    """Samples per second and bytes per step of rank 0, by stage."""
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
