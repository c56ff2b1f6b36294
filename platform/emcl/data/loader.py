"""From samples to batches (data/batch.py): decoding, the tasks' collators, loaders for training and evaluation."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from emcl.data.augment import Augmentation, augmentation
from emcl.data.batch import Batch, Clip, number_of, videos_of
from emcl.data.data_settings import DataConfig
from emcl.data.decode import DecodeError, decode_as
from emcl.data.frame_shapes import ByPIL, Shape, evaluated_shape
from emcl.data.loading_time import LoadingTime
from emcl.data.sampler import Draw, RankBatchSampler
from emcl.data.samples import Sample
from emcl.data.split import Split
from emcl.data.workers import Lives

Collator = Callable[[Sequence[Sample], Sequence[Draw]], Any]
"""Makes a task's part of a batch, in the loader's process."""

LOOK = 5.0
"""Seconds without a batch after which the workers are checked in training."""

_ATTEMPTS = 20
"""How many consecutive samples are tried, from one that does not decode."""


@dataclass(frozen=True)
class Loaded:
    """A sample with its decoded frames."""

    draw: Draw
    sample: Sample
    frames: Clip | None
    """None if decoding failed."""
    bad: list[str] = field(default_factory=list)
    """Samples tried before this one that did not decode, with the reason."""


class Clips(Dataset[Loaded]):
    """Decodes one sample at a time."""

    def __init__(
        self, split: Split, data: DataConfig, *, training: bool, video_of: Sequence[int] | None = None
    ) -> None:
        self.split, self.data, self.training = split, data, training
        self.video_of = video_of
        """For each row, the row whose video is used instead of its own."""
        self.spent = LoadingTime()
        """Time spent on samples since the last reset."""
        self._shape: Shape = evaluated_shape(data)
        self._augmented: ByPIL | None = None
        if training and data.augment != "none" and isinstance(self._shape, ByPIL):
            self._augmented = replace(self._shape, augment=data.augment)
        self._random = training and (data.jitter or self._augmented is not None)
        """Whether a video's frames differ between epochs."""
        self._cache: dict[int, Clip] = {}
        self._room = int(data.cache_gib * 2**30 / max(1, data.workers))

    def frames(self, index: int, seed: int | None) -> Clip:
        """The frames of a row of the split: cached features or frames if available, otherwise decoded."""
        remembered = self.split.remembered_frames(index)
        if remembered is not None:
            return remembered
        clip = self._cache.get(index)
        if clip is None:
            row = self.split.shards.rows[index]
            began = time.perf_counter()
            video = self.split.shards.read(row)
            read = time.perf_counter()
            clip = decode_as(
                self.data,
                video,
                start=row.sample.start,
                end=row.sample.end,
                jitter=np.random.default_rng(seed) if self.training and self.data.jitter else None,
                shape=partial(self._augmented, seed=seed) if self._augmented else self._shape,
            )
            self.spent += LoadingTime.of_sample(row.sample.id, read - began, time.perf_counter() - read)
            if not self._random and clip.nbytes <= self._room:
                self._cache[index] = clip
                self._room -= clip.nbytes
        return clip

    def __getitem__(self, draw: Draw) -> Loaded:
        """The drawn sample; in training, a broken one is replaced by the next that decodes and is listed in `bad`."""
        shards, bad = self.split.shards, []
        for attempt in range(_ATTEMPTS if self.training else 1):
            index = (draw.row + attempt) % len(shards)
            row = shards.rows[index]
            try:
                frames = self.frames(index if self.video_of is None else self.video_of[index], draw.seed)
            except (DecodeError, OSError) as error:
                bad.append(f"{row.sample.id} in {shards.paths[row.shard].name}: {error}")
                continue
            return Loaded(Draw(index, None, draw.seed) if attempt else draw, row.sample, frames, bad)
        return Loaded(draw, shards.rows[draw.row].sample, None, bad)

    def __len__(self) -> int:
        return len(self.split)


class Collate:
    """Joins the clips and calls every task's collator."""

    def __init__(
        self,
        collators: Mapping[str, Collator],
        *,
        frames: int,
        shuffle_seed: int | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.collators, self.frames, self.shuffle_seed = dict(collators), frames, shuffle_seed
        self.augmentation = augmentation

    def __call__(self, items: Sequence[Loaded]) -> Batch:
        bad = [name for item in items for name in item.bad]
        good = [(item.draw, item.sample, item.frames) for item in items if item.frames is not None]
        if not good:
            return Batch(ids=[], rows=[], videos=None, bad=bad)
        draws, samples, clips = map(list, zip(*good, strict=True))
        if self.shuffle_seed is not None:
            clips = [
                clip[np.random.default_rng((self.shuffle_seed, draw.row)).permutation(len(clip))]
                for draw, clip in zip(draws, clips, strict=True)
            ]
        plan = None
        if self.augmentation is not None:
            _, height, width, _ = clips[0].shape
            plan = self.augmentation.plan([draw.seed for draw in draws], list(map(len, clips)), height, width)
        return Batch(
            ids=[sample.id for sample in samples],
            rows=[draw.row for draw in draws],
            videos=videos_of(clips, self.frames),
            video_B=torch.tensor([number_of(sample, draw.row) for sample, draw in zip(samples, draws, strict=True)]),
            tasks={name: collator(samples, draws) for name, collator in self.collators.items()},
            augmentation=plan,
            bad=bad,
        )


def training_loader(
    split: Split, data: DataConfig, batches: RankBatchSampler, collators: Mapping[str, Collator]
) -> DataLoader[Any]:
    """The loader behind `data/resilient_loader.py`, which checks the workers every LOOK seconds."""
    plans = augmentation(data.augment)  # made in any case, so that a wrong one is named here and not by a worker
    # cached features were computed from unaugmented frames; PIL augments whole ones, before they are cropped
    on_device = split.features is None and data.resize == "ffmpeg"
    collate = Collate(collators, frames=data.frames, augmentation=plans if on_device else None)
    return _loader(Clips(split, data, training=True), data, batches, collate, look=LOOK if data.workers else 0)


def evaluation_loader(
    split: Split,
    data: DataConfig,
    collators: Mapping[str, Collator],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    rows: Sequence[int] | None = None,
    shuffle_seed: int | None = None,
    swap_seed: int | None = None,
) -> DataLoader[Any]:
    """Every sample (or those of `rows`) exactly once over all ranks.

    With `shuffle_seed`, frames of each video are shuffled; with `swap_seed`, each sample gets another sample's video.
    """
    wanted = range(len(split)) if rows is None else rows
    draws = [Draw(row, None, row) for row in wanted[rank::world_size]]
    batches = [draws[start : start + batch_size] for start in range(0, len(draws), batch_size)]
    collate = Collate(collators, frames=data.frames, shuffle_seed=shuffle_seed)
    video_of = None
    if swap_seed is not None:
        ring = random.Random(swap_seed).sample(range(len(split)), len(split))
        video_of = [0] * len(split)
        for position, row in enumerate(ring):  # the next one in a cycle, so that no sample keeps its own video
            video_of[row] = ring[(position + 1) % len(ring)]
    return _loader(Clips(split, data, training=False, video_of=video_of), data, batches, collate)


def _loader(clips: Clips, data: DataConfig, batches: Any, collate: Collate, *, look: float = 0) -> DataLoader[Any]:
    return DataLoader(
        clips,
        batch_sampler=batches,
        collate_fn=_Timed(clips, collate),
        num_workers=data.workers,
        worker_init_fn=Lives(data.workers),
        pin_memory=torch.cuda.is_available(),
        timeout=look,
    )


class _Timed:
    """Adds the loading time of a batch's clips; runs in the loader's process, next to the data set."""

    def __init__(self, clips: Clips, collate: Collate) -> None:
        self.clips, self.collate = clips, collate

    def __call__(self, items: Sequence[Loaded]) -> Batch:
        spent, self.clips.spent = self.clips.spent, LoadingTime()
        return replace(self.collate(items), loading=spent)
