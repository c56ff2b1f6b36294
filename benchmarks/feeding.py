"""Throughput of a loader process: clips stored with `emcl prepare --store`, with and without augmentation.

Figures are frames per second of CPU time, for one loader process on its own core. `augmented by PIL` runs timm's
RandAugment on each frame in the loader; ours only draws there, and the training device changes the pixels.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from emcl.data.augment import Augmentation
from emcl.data.data_settings import DataConfig
from emcl.data.image_ops import augment
from emcl.data.loader import Clips, Collate, Loaded
from emcl.data.rand_augment import rand_augment, seeded
from emcl.data.sampler import Draw
from emcl.data.shards import ShardSet, open_shards
from emcl.data.split import Split
from emcl.prepare.clips import Clip
from emcl.prepare.sharding import STORES, Encoding, Options, prepare_shards
from emcl.prepare.videos import Videos
from emcl.train.malloc import keep_freed_memory
from timing import Row, alternate, compared

FRAMES, SIZE, BATCH, TIMES = 12, 224, 4, 6
"""All clips are loaded TIMES times, so that process start-up is a small share."""
AUGMENT = "rand-m7-n4-mstd0.5-inc1"
PLAIN, BY_PIL = "without augmentation", "augmented by PIL"


def augment_by_pil(transform: Any, frames: np.ndarray[Any, Any], seed: int) -> np.ndarray[Any, Any]:
    """timm's RandAugment on each frame of a clip."""
    out = []
    for frame in frames:
        with seeded(seed):
            out.append(np.asarray(transform(Image.fromarray(frame))))
    return np.stack(out)


class ClipsByPIL(Clips):
    def __getitem__(self, draw: Draw) -> Loaded:
        loaded = super().__getitem__(draw)
        if not hasattr(self, "transform"):
            self.transform = rand_augment(AUGMENT)
        if loaded.frames is None:
            return loaded
        return replace(loaded, frames=augment_by_pil(self.transform, loaded.frames, loaded.draw.seed))


def frames_per_core_second(shards: ShardSet, side: str) -> float:
    data = DataConfig(frames=FRAMES, image_size=SIZE, workers=1)
    clips = (ClipsByPIL if side == BY_PIL else Clips)(Split(shards), data, training=True)
    draws = [Draw(row, None, number) for number, row in enumerate(list(range(len(shards))) * TIMES)]
    batches: Any = [draws[first : first + BATCH] for first in range(0, len(draws), BATCH)]
    collate = Collate({}, frames=FRAMES, augmentation=Augmentation(AUGMENT) if side == "ours" else None)
    before = _of_children()
    loader: DataLoader[Any] = DataLoader(clips, batch_sampler=batches, collate_fn=collate, num_workers=1)
    frames = sum(batch.frame_count for batch in loader)
    return frames / (_of_children() - before)


def _of_children() -> float:
    """CPU seconds of the child processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def augmentation_row(clips: list[np.ndarray[Any, Any]], repeats: int) -> Row:
    """CPU cost of the augmentation alone, with one thread."""
    augmentation, transform = Augmentation(AUGMENT), rand_augment(AUGMENT)
    frames, counts = torch.from_numpy(np.concatenate(clips)), [len(clip) for clip in clips]
    keep_freed_memory()  # as training does
    torch.set_num_threads(1)
    seeds = range(TIMES * len(clips))

    def ours() -> None:
        for first in range(0, len(seeds), len(clips)):
            augment(frames, augmentation.plan(seeds[first : first + len(clips)], counts, SIZE, SIZE))

    def pil() -> None:
        for seed in seeds:
            augment_by_pil(transform, clips[seed % len(clips)], seed)

    def milliseconds(work: Callable[[], None]) -> float:
        began = time.process_time()
        work()
        return 1000 * (time.process_time() - began) / len(seeds)

    costs = alternate({"ours": partial(milliseconds, ours), "PIL": partial(milliseconds, pil)}, repeats)
    return compared("loading", "augmenting a clip on a CPU", "ms", costs)


def rows(files: list[Path], folder: Path, repeats: int) -> list[Row]:
    """One row per storage format, and one for the augmentation alone."""
    made = []
    for store in STORES:
        clips = [Clip(id=path.stem, file=path.name, split="train", captions=["x"]) for path in files]
        options = Options(encoding=Encoding(store=store, size=SIZE), progress=False)
        prepare_shards(clips, Videos(files[0].parent), folder / store, options, source="bench")
        shards = open_shards(f"{folder / store}/train-*.tar")
        sides = {name: partial(frames_per_core_second, shards, name) for name in ("ours", PLAIN, BY_PIL)}
        rates = alternate(sides, repeats)
        size = sum(row.size for row in shards.rows) / len(shards) / 1000
        made.append(compared("loading", f"a core, --store {store}", "frames/s", rates, note=f"{size:,.0f} kB a clip"))
    decoded = Clips(Split(shards), DataConfig(frames=FRAMES, image_size=SIZE), training=False)
    some = [decoded[Draw(row, None, 0)].frames for row in range(min(BATCH, len(shards)))]
    return [*made, augmentation_row([clip for clip in some if clip is not None], repeats)]
