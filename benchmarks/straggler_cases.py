"""Checks that a rank that slows down the others is reported with its cause, and that clean runs report nobody.

    python benchmarks/straggler_cases.py --runs 20

Real runs with 2 and 4 ranks over gloo on a small model: runs with a slow rank, a slow disk or very large clips on one
rank alternate with clean runs. A run with a slow rank is right if its log names that rank and cause and no other; a
clean run is right if it names nobody.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

from emcl.prepare.sample_set import generate
from local_ranks import start_ranks

ROOT = Path(__file__).resolve().parent.parent
SLOW_RANK = ROOT / "benchmarks" / "slow_rank.py"
CAUSES = {
    "compute": ("0.1", "forward"),
    "disk": ("0.1", "loading (reading shards"),
    "clip": ("2.0", "loading (decoding"),
}
"""Delay in seconds, and the expected text in the log."""
CLIPS = 480
SETTINGS = (
    "data.generate=false", "data.image_size=32", "data.frames=3", "data.max_tokens=16",
    "data.val=null", "data.test=null",
    "data.batch_size=8", "data.cache_gib=0", "optim.max_steps=50", "tracking.enabled=false",
    "checkpoint.every_steps=100000",
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    world_size: int
    kind: str
    """One of `CAUSES`, or empty for a clean run."""
    rank: int


def trials(runs: int) -> Iterator[Trial]:
    """Runs with a slow rank, alternating with as many clean ones."""
    slow = [Trial(size, kind, rank) for rank, size, kind in product(range(4), (2, 4), CAUSES) if rank < size]
    clean = [Trial(size, "", 0) for size in (2, 4)]
    for pair in islice(zip(cycle(slow), cycle(clean), strict=False), runs):
        yield from pair


def spawn(arguments: list[str], ranks: int, environment: dict[str, str], cwd: Path, log: Path) -> list[Any]:
    """Starts one process per rank; all write to the same log."""
    command = [sys.executable, "-u", str(SLOW_RANK), *arguments]
    with log.open("w") as out:
        return start_ranks(command, ranks, env=environment, cwd=cwd, stdout=out, stderr=subprocess.STDOUT)


def named(
    trial: Trial, shards: Path, *settings: str, seconds: str | None = None, start: Callable[..., list[Any]] = spawn
) -> list[str]:
    """The lines of a run's log about ranks that others wait for.

    Args:
        seconds: replaces the delay in `CAUSES`.
        start: starts the ranks and returns objects with a `wait` method.
    """
    seconds = seconds or (CAUSES[trial.kind][0] if trial.kind else "0")
    environment = {
        **os.environ, "SLOW_BY": trial.kind, "SLOW_RANK": str(trial.rank), "SLOW_SECONDS": seconds,
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "platform"),
    }  # fmt: skip
    arguments = [
        "--task", "retrieval", "name=run", f"data.train={shards}/train-*.tar",
        f"model.name={ROOT / 'tests' / 'tiny_clip.json'}", *SETTINGS, *settings,
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        codes = [rank.wait() for rank in start(arguments, trial.world_size, environment, Path(folder), log)]
        said = log.read_text()
    if any(codes):
        raise RuntimeError(said[-2000:])
    return [line for line in re.split(r"[\r\n]", said) if "the others wait for rank" in line]


def right(trial: Trial, lines: list[str]) -> bool:
    if not trial.kind:
        return not lines
    return bool(lines) and all(says(line, trial) for line in lines)


def says(line: str, trial: Trial) -> bool:
    return f"the others wait for rank {trial.rank}: {CAUSES[trial.kind][1]}" in line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="with a slow rank, and as many clean ones (%(default)s)")
    runs = parser.parse_args().runs
    counts = {True: 0, False: 0}
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        generate(shards, counts={"train": CLIPS, "val": 1, "test": 1}, seed=0)
        for trial in trials(runs):
            lines = named(trial, shards)
            good = right(trial, lines)
            counts[bool(trial.kind)] += good
            print(f"{'right' if good else 'WRONG'}: {trial}: {lines[0] if lines else 'nobody'}", flush=True)
    print(f"named right: {counts[True]} of {runs}; clean runs that name nobody: {counts[False]} of {runs}")
    return 0 if counts == {True: runs, False: runs} else 1


if __name__ == "__main__":
    sys.exit(main())
