"""Start-up time until the end of the first step, by phase, and the time of `--help` and of errors."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sample_clips import sample_clips, settings
from timing import Row, alternate, script, spread

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = str(ROOT / "platform" / "launch.py")
MARKS = ("main", "settings", "torch", "deepspeed", "inputs", "group", "model", "first step")
PROBE = """
import sys, time
began = float(sys.argv[1])
def mark(name):
    print(f"MARK {name} {time.time() - began}", flush=True)
mark("main")
import emcl.config as config
config.resolve(["retrieval"], "sample", sys.argv[3:])
mark("settings")
import torch
mark("torch")
import deepspeed
mark("deepspeed")
from pathlib import Path
from emcl import distributed
from emcl.run_folder import RunFolder
from emcl.train.loop import Trainer
from emcl.train.initialization import open_splits
opened = open_splits(config.resolve(["retrieval"], "sample", sys.argv[3:]))
mark("inputs")
distributed.quiet_start()
ranks = distributed.start()
mark("group")
trainer = Trainer(*opened, ranks, distributed.device(), RunFolder(Path(sys.argv[2])))
mark("model")
batch, _ = next(trainer._steps(0))
trainer._step(batch)
mark("first step")
distributed.stop()
"""


def seconds(*command: str, env: dict[str, str] | None = None) -> float:
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, env={**os.environ, **(env or {})})
    return time.perf_counter() - began


def marks(folder: Path, clips: str) -> dict[str, float]:
    """Seconds of each phase, in a process that does the same as launch.py."""
    command = [sys.executable, "-c", PROBE, str(time.time()), str(folder / "run"), *settings(clips)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    durations, before = {}, 0.0
    for line in done.stdout.splitlines():
        if line.startswith("MARK "):
            name, _, at = line[5:].rpartition(" ")
            durations[name] = float(at) - before
            before = float(at)
    return durations


def measure(repeats: int) -> list[Row]:
    python = sys.executable
    deepspeed = str(Path(python).parent / "deepspeed")
    with tempfile.TemporaryDirectory() as name, sample_clips() as clips:
        runs = [marks(Path(name), clips) for _ in range(repeats)]
    sides = {
        "--help": lambda: seconds(python, LAUNCH, "--help"),
        "a wrong setting": lambda: seconds(python, LAUNCH, "--task", "retrieval", "optim.lrr=1"),
        "a wrong setting of a task": lambda: seconds(python, LAUNCH, "--task", "all", "tasks.captioning.layer=2"),
        "missing shards": lambda: seconds(python, LAUNCH, "--task", "retrieval", "data.train=nowhere/*.tar"),
        "emcl --help": lambda: seconds(str(Path(python).parent / "emcl"), "--help"),
    }
    timings = alternate(sides, repeats)
    timings["the launcher itself"] = [seconds(deepspeed, "--num_accelerators", "1", LAUNCH, "--help")]
    rows = []
    for item, values in timings.items():
        limit = {} if item == "the launcher itself" else {"limit": 2.0}
        target = {"limit": "<= 1"} if limit else {}
        rows.append(Row("start", item, "s", statistics.median(values), limit, spread(values), target))
    whole = {"in all": statistics.median(sum(run.values()) for run in runs)}
    for mark in MARKS:
        values = [run[mark] for run in runs]
        rows.append(Row("start", f"to the first step: {mark}", "s", statistics.median(values), whole, spread(values)))
    return rows


if __name__ == "__main__":
    script(__doc__, measure, "startup")
