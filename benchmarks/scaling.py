"""Samples a second on one and two processes under each ZeRO stage, and the bytes that a step sends.

Real steps of the sample recipe (`scaling_rank.py`, started as the launcher starts ranks), one thread a process, the
global batch fixed at 128. What is counted are the bytes that each rank gives to collectives in one step; the fewest
possible are one reduction of the gradients and one gathering of each rank's texts and frames, there and back.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from emcl.prepare.sample import generate
from timing import Row, alternate, compared, script

HERE = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(folder: Path, ranks: int, stage: int) -> dict[str, float]:
    """Samples a second and bytes a step of rank 0."""
    out = folder / f"{ranks}-{stage}.json"
    command = [sys.executable, str(HERE / "scaling_rank.py"), str(folder), str(stage), str(out)]
    group = {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    processes = []
    for rank in range(ranks):
        own = {name: str(value) for name, value in (group | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **own}
        processes.append(
            subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        )
    for process in processes:
        _, said = process.communicate()
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: {said.decode()[-2000:]}")
    return dict(json.loads(out.read_text()))


def measure(repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "sample", counts={"train": 512, "val": 0, "test": 0}, seed=0, progress=False)
        found: dict[str, list[dict[str, float]]] = {}

        def side(ranks: int, stage: int) -> float:
            found.setdefault(f"{ranks}/{stage}", []).append(run(folder, ranks, stage))
            return found[f"{ranks}/{stage}"][-1]["samples_per_second"]

        sides = {"one process": lambda: side(1, 1)}
        sides |= {f"ZeRO-{stage}": lambda stage=stage: side(2, stage) for stage in (0, 1, 2, 3)}  # type: ignore[misc]
        rates = alternate(sides, max(1, repeats - 1))
    targets = {"one process": ">= 1.6"}
    rows = [compared("scaling", "two processes", "samples/s", rates, ours="ZeRO-1", targets=targets)]
    for stage in (0, 1, 2, 3):
        last = found[f"2/{stage}"][-1]
        fewest = {"the fewest": last["fewest"] / 2**20}
        rows.append(Row("scaling", f"sent a step, ZeRO-{stage}", "MiB", last["sent"] / 2**20, fewest, 0.0))
    return rows


if __name__ == "__main__":
    script(__doc__, measure, "scaling")
