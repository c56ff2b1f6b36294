"""Runs every benchmark with its baseline and prints one table: `make bench`.

    make bench ARGS='--only loading step'

Each item runs in a separate process (`python benchmarks/ITEM.py` runs one item). The table goes to
benchmarks/results/bench.md and .json, and figures and ratios to MLflow (experiment `benchmarks`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

from sample_clips import GIVEN, sample_clips
from timing import RESULTS, Row, table

ITEMS = (
    "loading",
    "step",
    "layer_and_similarity",
    "shared_speed",
    "caption_speed",
    "preparing",
    "evaluation",
    "scaling",
    "startup",
    "gpu",
)
SAMPLE = {"loading", "step", "scaling", "startup", "gpu"}
"""Items that use clips of the sample set."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=[])
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    rows: list[Row] = []
    began = time.perf_counter()
    chosen = options.only or items()
    with sample_clips() if SAMPLE & set(chosen) else nullcontext("") as clips:
        for item in chosen:
            start = time.perf_counter()
            command = [sys.executable, str(Path(__file__).with_name(f"{item}.py")), "--repeats", str(options.repeats)]
            environment = {**os.environ, GIVEN: clips}
            done = subprocess.run(
                command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            print(f"{item}: {time.perf_counter() - start:.0f} s", flush=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return done.returncode
            rows += [Row(**row) for row in json.loads((RESULTS / f"{item}.json").read_text())]
    text = f"{machine()}, {time.perf_counter() - began:.0f} s in all\n\n{table(rows)}\n"
    print(f"\n{text}")
    (RESULTS / "bench.md").write_text(text)
    (RESULTS / "bench.json").write_text(json.dumps([row.__dict__ for row in rows], indent=1))
    track(rows)
    return 0


def items() -> list[str]:
    """The items that this machine can run."""
    import torch

    return [item for item in ITEMS if item != "gpu" or torch.cuda.is_available()]


def machine() -> str:
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{os.cpu_count()} cores, {platform.machine()}{gpu}, PyTorch {torch.__version__}"


def track(rows: list[Row]) -> None:
    """Logs one MLflow run with every figure and every ratio."""
    import re

    import mlflow

    mlflow.set_tracking_uri(os.environ.get("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db"))
    mlflow.set_experiment("benchmarks")

    def name(*words: str) -> str:
        return "/".join(re.sub(r"[^\w\-. ]", "_", word) for word in words)

    with mlflow.start_run():
        mlflow.set_tag("machine", machine())
        for row in rows:
            mlflow.log_metric(name(row.item, row.case), row.ours)
            for other in row.others:
                mlflow.log_metric(name(row.item, row.case, f"against {other}"), row.ratio(other))
        mlflow.log_artifact(str(RESULTS / "bench.md"))


if __name__ == "__main__":
    sys.exit(main())
