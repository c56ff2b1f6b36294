"""What single settings cost on this device: augmentation, EMCL's reference in evaluation, `deterministic`."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from emcl.data.augment import Augmentation
from emcl.data.batch import to_device
from emcl.data.image_ops import augment
from emcl.distributed import ALONE
from emcl.doctor.checks import Check
from emcl.doctor.speed import REPEATS, case_of, median_seconds, seconds_a_step, spread
from emcl.doctor.trainers import Bench, settings, taken, trainer

AUGMENT = "rand-m7-n4-mstd0.5-inc1"
FRAMES = 12
SIZES = {"cuda": (64, 1000), "cpu": (4, 64)}
"""Videos that are augmented together, and texts and videos that are compared."""


def augmentation(bench: Bench) -> Iterator[Check]:
    """Augments a batch's frames on the device: the difference from the CPU's pixels, and the time."""
    videos, _ = SIZES[bench.device.type]
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (videos * FRAMES, 224, 224, 3), dtype=torch.uint8, generator=generator)
    plan = Augmentation(AUGMENT).plan(range(videos), [FRAMES] * videos, 224, 224)
    on_device, moved = frames.to(bench.device), to_device(plan, bench.device)
    if bench.on_gpu:
        off = (augment(on_device, moved).cpu().int() - augment(frames, plan).int()).abs()
        most = int(off.max())
        figure = f"{100 * float((off > 0).float().mean()):.4f}% differ, by {most} at most"
        yield Check(f"augmented pixels beside the CPU's, {len(frames)} frames", figure, "by 1 at most", most <= 1)
    seconds = median_seconds(bench.device, lambda: augment(on_device, moved), REPEATS)
    yield Check(f"augmenting {videos} x {FRAMES} frames", f"{1000 * seconds:.1f} ms")


def comparing(bench: Bench) -> Iterator[Check]:
    """Compares every text with every video, as evaluation does, with the reference's EM in each tile."""
    _, count = SIZES[bench.device.type]
    config = settings(bench, *case_of(bench)[1])
    with trainer(bench, config, "comparing") as made:
        head: Any = made.model.heads["retrieval"].eval()
        width = made.model.backbone.embed_dim
        generator = torch.Generator().manual_seed(0)
        text_QD = torch.randn(count, width, generator=generator).to(bench.device)
        frames_GTD = torch.randn(count, FRAMES, width, generator=generator).to(bench.device)
        mask_GT = torch.ones(count, FRAMES, dtype=torch.bool, device=bench.device)
        for name, layer in (("reference EMCL", head.emcl), ("no EMCL", None)):
            compare = partial(
                head.similarity_in_tiles, text_QD, frames_GTD, mask_GT, config.evaluate.tile, ALONE, layer
            )
            seconds = median_seconds(bench.device, compare, REPEATS)
            yield Check(f"{count} texts x {count} videos, {name}", f"{seconds:.2f} s")


def deterministic(bench: Bench) -> Iterator[Check]:
    """Time of a step with `deterministic=true`, relative to one without."""
    name, overrides = case_of(bench)
    seconds: dict[str, list[float]] = {}
    for switch in ("false", "true"):
        with trainer(bench, settings(bench, *overrides, f"deterministic={switch}"), f"deterministic-{switch}") as made:
            ((_, batches),) = taken(made, 1)
            seconds[switch] = seconds_a_step(made, batches)
    price = statistics.median(seconds["true"]) / statistics.median(seconds["false"])
    figure = f"{price:.2f} of one without ({spread(seconds['false'])})"
    yield Check(f"deterministic=true, step of {name}", figure)
