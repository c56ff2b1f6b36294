"""Training speed of published towers, their memory compared with the plan, and EMCL's share of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from emcl.data.batch import Batch
from emcl.doctor.checks import Check
from emcl.doctor.trainers import Bench, free, one_step, settings, taken, trainer
from emcl.train.flops import Flops, peak_flops
from emcl.train.loop import Trainer
from emcl.train.plan import planned_peak

GIB = 2**30
REPEATS = 3
STEPS = {"cuda": 4, "cpu": 1}
PLANNED_GAP = 0.10
"""Allowed relative error of the plan, which lacks the allocator's rounding and cuBLAS's workspaces."""
TOWERS = {"ViT-B-32": 64, "ViT-L-14": 16}
"""Videos of 12 frames a step."""
SMALL = {"sample model": 8}
"""On a CPU, to see that the check works."""


def speed(bench: Bench) -> Iterator[Check]:
    """Frames a second, MFU and memory, with and without activation checkpointing and torch.compile."""
    rate = product_rate(bench.device)
    yield Check("a bf16 product of this device", f"{rate / 1e12:.1f} TFLOP/s")
    for name, videos in (TOWERS if bench.on_gpu else SMALL).items():
        yield from _tower(bench, name, videos, rate, recomputed=False)
        yield from _tower(bench, name, videos, rate, recomputed=True)
    if bench.on_gpu:
        for name, videos in TOWERS.items():
            yield from _tower(bench, name, videos, rate, recomputed=False, compiled=True)


def case_of(bench: Bench) -> tuple[str, list[str]]:
    """Name with number of videos, and settings, of the first tower that is timed."""
    name, videos = next(iter((TOWERS if bench.on_gpu else SMALL).items()))
    return f"{name} x {videos}", _of(name, videos)


def emcl_share(bench: Bench) -> Iterator[Check]:
    """EMCL's share of a step, by comparison with the same step without it."""
    name, overrides = case_of(bench)
    for variant in ("reference", "compact"):
        with trainer(bench, settings(bench, *overrides, f"emcl.variant={variant}"), f"emcl-{variant}") as made:
            ((_, batches),) = taken(made, 1)
            retrieval: Any = made.model.heads["retrieval"]
            layer, seconds = retrieval.emcl, {True: list[float](), False: list[float]()}
            for enabled in (True, False, True, False):  # alternating, since a machine's speed drifts
                retrieval.emcl = layer if enabled else None
                seconds[enabled] += seconds_a_step(made, batches)
            retrieval.emcl = layer
        share = 1 - statistics.median(seconds[False]) / statistics.median(seconds[True])
        figure = f"{100 * share:.1f}% (steps: {spread(seconds[True])})"
        yield Check(f"EMCL {variant}, share of a step of {name}", figure)


def _of(name: str, videos: int) -> list[str]:
    model = [] if name in SMALL else [f"model.name={name}", "data.image_size=224"]
    return [*model, "data.frames=12", "precision=bf16", f"data.batch_size={videos}"]


def _tower(
    bench: Bench, name: str, videos: int, rate: float, *, recomputed: bool, compiled: bool = False
) -> Iterator[Check]:
    case = f"{name}, {videos} x 12 frames" + (", recomputed" if recomputed else "") + (", compiled" if compiled else "")
    config = settings(bench, *_of(name, videos), f"model.activation_checkpointing={str(recomputed).lower()}")
    free(bench.device)
    if bench.on_gpu:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    try:
        with trainer(bench, config, f"speed-{name}-{recomputed}-{compiled}") as made:
            if compiled:
                made.model.backbone.image.trunk.compile()
            ((_, batches),) = taken(made, 1)
            one_step(made, 0, batches)
            seconds = seconds_a_step(made, batches)
            flops = Flops.of(made.config).of_step(batches[0].frame_count, len(batches[0].ids))
        peak = torch.cuda.max_memory_allocated() - before if bench.on_gpu else None
    except torch.OutOfMemoryError:
        yield Check(case, "does not fit into this GPU's memory")
        return
    frames, median = batches[0].frame_count, statistics.median(seconds)
    yield Check(case, f"{frames / median:,.0f} frames/s ({spread(seconds)})")
    nominal = peak_flops(bench.device, "bf16")
    share = f"{100 * flops / median / rate:.1f}% of this device's product"
    yield Check(f"{case}: MFU", (f"{100 * flops / median / nominal:.1f}%, " if nominal else "") + share)
    if peak is not None and not compiled:
        yield _memory(config, case, peak)


def _memory(config: Any, case: str, peak: float) -> Check:
    planned = planned_peak(config, gpus=1)
    if planned is None:
        return Check(f"{case}: peak memory", f"{peak / GIB:.2f} GiB (no plan on this PyTorch)")
    off = abs(peak - planned) / peak
    figure = f"{peak / GIB:.2f} GiB, planned {planned / GIB:.2f}"
    return Check(f"{case}: peak memory", figure, f"within {100 * PLANNED_GAP:.0f}%", off <= PLANNED_GAP)


def seconds_a_step(made: Trainer, batches: list[Batch]) -> list[float]:
    """Seconds of a step, measured `REPEATS` times."""
    one_step(made, 0, batches)
    steps = STEPS.get(made.device.type, 1)

    def run() -> None:
        for step in range(steps):
            one_step(made, step, batches)

    return [timed(made.device, run) / steps for _ in range(REPEATS)]


def spread(seconds: list[float]) -> str:
    """The range of the times, relative to their median."""
    return f"spread {100 * (max(seconds) - min(seconds)) / statistics.median(seconds):.0f}%"


def timed(device: torch.device, action: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    _synchronize(device)
    began = time.perf_counter()
    action()
    _synchronize(device)
    return time.perf_counter() - began


def median_seconds(device: torch.device, action: Callable[[], Any], times: int) -> float:
    """Median of so many runs, after one that does not count."""
    return statistics.median([timed(device, action) for _ in range(1 + times)][1:])


def product_rate(device: torch.device) -> float:
    """FLOP/s of a large bf16 matrix product."""
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(device, lambda: left @ right, 5)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
