"""Our training step compared with a bare PyTorch loop: the same model, batches, optimiser and precision.

Ours is `Trainer`'s step: DeepSpeed ZeRO-1 on one process, the check for skipped steps, the meter, a report to MLflow
every ten steps. The bare loop: forward, backward, clipping, AdamW, schedule. Both use preloaded batches. Then a short
run of the sample recipe: the share of time spent waiting for data, reporting, and timing the parts of a step.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

import torch

from emcl import distributed
from emcl.config import resolve
from emcl.multitask import total_loss
from emcl.run_folder import RunFolder
from emcl.tracking import open_tracker
from emcl.train.initialization import open_splits
from emcl.train.loop import Trainer
from emcl.train.optimizer import build_optimizer
from emcl.train.schedule import build_schedule
from emcl.train.step_clock import PARTS, StepClock
from sample_clips import sample_clips, settings
from timing import Row, alternate, compared, script

STEPS = 6
"""Steps per repeat; sides alternate step by step, because a machine's speed drifts."""
COLLECTIVES = 40
"""Collectives per step on several ranks: DeepSpeed's buckets, the gathered frames and scores."""


def trainer_of(folder: Path, clips: str, *overrides: str) -> Trainer:
    config = resolve(["retrieval"], "sample", [*settings(clips), *overrides])
    ranks = distributed.start()
    trainer = Trainer(*open_splits(config), ranks, distributed.device(), RunFolder(folder / "run"))
    trainer.tracker = open_tracker(config, "benchmark", first_rank=True)
    trainer.engine.train()
    return trainer


class Bar:
    """Replaces the progress bar."""

    def set_postfix_str(self, text: str) -> None: ...


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_row(folder: Path, clips: str, stage: int, repeats: int) -> Row:
    trainer = trainer_of(folder, clips, f"deepspeed=deepspeed/zero{stage}.json")
    config, device = trainer.config, trainer.device
    plain = copy.deepcopy(trainer.model)
    optimizer = build_optimizer(plain, config.optim, offload=False, fused=device.type == "cuda")
    schedule = build_schedule(optimizer, config.optim, trainer.total)
    batches = [
        micro_batches for micro_batches, _ in zip((batch for batch, _ in trainer._steps(0)), range(STEPS), strict=False)
    ]

    our_steps, bare_steps = count(), count()

    def ours() -> float:
        step, began = next(our_steps), time.perf_counter()
        batch = batches[step % len(batches)]
        trainer._seed(step)
        losses = trainer._step(batch)
        trainer.meter.add(losses, batch, 0.0, skipped=trainer._check_skipped(step, batch))
        if (step + 1) % config.tracking.every_steps == 0:
            bar: Any = Bar()
            trainer._report(bar, step + 1)
        synchronize()
        return time.perf_counter() - began

    def bare() -> float:
        step, began = next(bare_steps), time.perf_counter()
        loss = total_loss(plain(batch=batches[step % len(batches)][0].to(device)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), config.optim.grad_clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        synchronize()
        return time.perf_counter() - began

    for _ in range(2):
        ours()
        bare()
    timings = alternate({"ours": ours, "bare PyTorch": bare}, repeats * STEPS)
    trainer.tracker.finish()
    return compared(
        "step", f"sample recipe, ZeRO-{stage}, one process", "s", timings, targets={"bare PyTorch": "<= 1.03"}
    )


def share_rows(folder: Path, clips: str) -> list[Row]:
    """Shares of the time of a run's steps, without the first STEPS."""
    trainer = trainer_of(folder, clips, "optim.max_steps=26")
    bar: Any = Bar()
    waited = reporting = 0.0
    began = time.perf_counter()
    for step, (batch, seconds) in enumerate(trainer._steps(0)):
        if step == STEPS:
            waited, reporting, began = 0.0, 0.0, time.perf_counter()
        losses = trainer._step(batch)
        trainer.meter.add(losses, batch, seconds, skipped=trainer._check_skipped(step, batch))
        waited += seconds
        if (step + 1) % trainer.config.tracking.every_steps == 0:
            synchronize()
            start = time.perf_counter()
            trainer._report(bar, step + 1)
            reporting += time.perf_counter() - start
    whole = time.perf_counter() - began
    trainer.tracker.finish()
    marks = marks_of_a_step(trainer.device) * (step + 1 - STEPS)
    return [
        Row("step", "waiting for data", "% of the time", 100 * waited / whole, {"limit": 2.0}, None, {"limit": "<= 1"}),
        Row("step", "reporting", "% of the time", 100 * reporting / whole, {"limit": 0.5}, None, {"limit": "<= 1"}),
        Row(
            "step", f"marks of its parts and {COLLECTIVES} collectives", "% of the time", 100 * marks / whole,
            {"limit": 0.5}, None, {"limit": "<= 1"},
        ),
    ]  # fmt: skip


def marks_of_a_step(device: torch.device) -> float:
    """Seconds per step that the step clock itself costs with several ranks."""
    clock, steps = StepClock(device), 200
    began = time.perf_counter()
    for step in range(steps):
        for name in PARTS[1:]:
            with clock.part(name):
                for _ in range(COLLECTIVES // len(PARTS[1:])):
                    with clock.wait():
                        pass
        if step % 10 == 9:
            synchronize()
            clock.read()
    return (time.perf_counter() - began) / steps


def measure(repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name, sample_clips() as clips:
        folder = Path(name)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        rows = [*(step_row(folder, clips, stage, repeats) for stage in (1, 0)), *share_rows(folder, clips)]
        distributed.stop()
    return rows


if __name__ == "__main__":
    script(__doc__, measure, "step")
