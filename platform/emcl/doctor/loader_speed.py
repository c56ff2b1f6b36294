"""The loaders' throughput: frames a second of one loader process, and of as many as the cores allow."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from emcl.data.split import open_training_split
from emcl.doctor.checks import Check
from emcl.doctor.trainers import Bench, batches_of, settings

BATCHES = 24
WARM = 4
"""Warm-up batches that are not counted: processes start meanwhile."""


def feeding(bench: Bench) -> Iterator[Check]:
    """Sample clips at 224 pixels, 12 frames each."""
    cores = len(os.sched_getaffinity(0))
    yield Check("cores for this process", str(cores))
    for workers in sorted({1, max(1, cores - 1)}):
        config = settings(bench, "data.image_size=224", "data.frames=12", f"data.workers={workers}")
        training = open_training_split(config.data, config.seed)
        steps = batches_of(training, config, WARM + BATCHES, {})
        for _ in range(WARM):
            next(steps)
        began, frames = time.perf_counter(), 0
        for _ in range(BATCHES):
            (batch,) = next(steps)
            frames += batch.frame_count
        steps.close()
        rate = frames / (time.perf_counter() - began)
        yield Check(f"{workers} loader process{'es' if workers > 1 else ''}", f"{rate:,.0f} frames/s")
