"""Rows for machines with a GPU: a training step of published towers, frames per second, MFU and memory.

MFU is the model's FLOPs per second (counted by PyTorch's FLOP counter over forward and backward of one step, including
recomputation) divided by the rate of a large bf16 matrix product on the same device in the same run. Batches are
already in host memory: loading is measured separately. Without a GPU there are no rows; EMCL_BENCH_ANY=1 runs a small
model on any device, to check that the benchmark works.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from emcl import distributed
from emcl.doctor.speed import product_rate
from sample_clips import sample_clips
from step import synchronize, trainer_of
from timing import Row, script, spread

STEPS = 10
"""A figure is the mean of this many steps."""
CASES: dict[str, tuple[str, ...]] = {
    "ViT-B-32, 64 x 12 frames": ("model.name=ViT-B-32", "data.batch_size=64"),
    "ViT-L-14, 43 x 12 frames, recomputed": (
        "model.name=ViT-L-14", "data.batch_size=43", "model.activation_checkpointing=true",
    ),
}  # fmt: skip
SMALL = {"a small model": ("data.batch_size=8", "data.image_size=64", "precision=fp32")}


def rows_of(case: str, settings: tuple[str, ...], folder: Path, clips: str, repeats: int) -> list[Row]:
    frames = ("data.frames=12", "data.image_size=224", "precision=bf16", "optim.max_steps=100", "data.workers=4")
    trainer = trainer_of(folder, clips, *frames, *settings)
    batch, _ = next(trainer._steps(0))
    shown = batch[0].frame_count
    counter = FlopCounterMode(display=False)
    with counter:
        trainer._step(batch)
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def steps() -> float:
        began = time.perf_counter()
        for number in range(STEPS):
            trainer._seed(number)
            trainer._step(batch)
        synchronize()
        return (time.perf_counter() - began) / STEPS

    steps()
    seconds = [steps() for _ in range(repeats)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if trainer.device.type == "cuda" else float("nan")
    reached = counter.get_total_flops() / product_rate(trainer.device)
    trainer.tracker.finish()
    return [
        _row(case, "frames/s", seconds, lambda one: shown / one),
        _row(f"{case}, MFU", "of a bf16 product's rate", seconds, lambda one: reached / one),
        Row("gpu", f"{case}, peak memory", "GiB", peak, {}, None),
    ]


def _row(case: str, unit: str, seconds: list[float], figure: Callable[[float], float]) -> Row:
    values = [figure(one) for one in seconds]
    return Row("gpu", case, unit, statistics.median(values), {}, spread(values))


def measure(repeats: int) -> list[Row]:
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not os.environ.get("EMCL_BENCH_ANY"):
        return []
    cases: dict[str, Any] = CASES if on_gpu else SMALL
    with tempfile.TemporaryDirectory() as name, sample_clips() as clips:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        rows = [row for case, settings in cases.items() for row in rows_of(case, settings, folder, clips, repeats)]
        distributed.stop()
    return rows


if __name__ == "__main__":
    script(__doc__, measure, "gpu")
