"""Samples to batches: decoding, the tasks' own parts, and the loaders for training and evaluation.

A batch is a dictionary: `frames` (n, H, W, 3) uint8, all frames of its B videos one after another; `frame_slot` (n,)
each one's place in the flattened (B, T); `video_mask` (B, T) bool; `ids`; `bad`, which samples did not decode and
why; `loading`, what a `LoadingTime` says; `augment`, in training, how the frames are to be changed (data/image_ops.py
does it on the device); and `tasks`, of each by name what its collator made.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from emcl.data.augment import Augmentation, augmentation
from emcl.data.decode import DecodeError, decode
from emcl.data.features import FeatureStore
from emcl.data.loading_time import LoadingTime
from emcl.data.order import Draw, RankBatches
from emcl.data.samples import Sample
from emcl.data.settings import DataConfig
from emcl.data.shards import Row, ShardSet
from emcl.data.workers import Lives

Clip = NDArray[Any]
"""(n, H, W, 3) uint8 frames, or (n, W) features of a frozen image tower."""

Collator = Callable[[Sequence[Sample], Sequence[Draw]], Any]
"""A task's part of a batch, made in the loader's process."""

LOOK = 5.0
"""Seconds after which silent workers are looked after in training."""

_ATTEMPTS = 20
"""Neighbours to try in place of a clip that does not decode."""


class Clips(Dataset[Any]):
    """Decodes one sample at a time."""

    def __init__(
        self,
        shards: ShardSet,
        data: DataConfig,
        *,
        training: bool,
        features: FeatureStore | None = None,
        video_of: Sequence[int] | None = None,
    ) -> None:
        self.shards, self.data, self.training, self.features = shards, data, training, features
        self.video_of = video_of
        """Which row's video each row is shown with, in place of its own."""
        self.spent = LoadingTime()
        """On the samples since somebody looked last."""
        self._cache: dict[int, Clip] = {}
        self._room = int(data.cache_gib * 2**30 / max(1, data.workers))

    def frames(self, row: Row, index: int, seed: int | None) -> Clip:
        """From the features or the cache where there are any."""
        if self.features is not None:
            return self.features.frames(index)
        random_times = self.data.jitter and self.training
        found = self._cache.get(index)
        if found is None:
            began = time.perf_counter()
            video = self.shards.read(row)
            read = time.perf_counter()
            found = decode(
                video,
                frames=self.data.frames,
                size=self.data.size,
                fps=self.data.fps,
                start=row.sample.start,
                end=row.sample.end,
                jitter=np.random.default_rng(seed) if random_times else None,
                keyframes=self.data.keyframes,
            )
            self.spent += LoadingTime.of_sample(row.sample.id, read - began, time.perf_counter() - read)
            if not random_times and found.nbytes <= self._room:
                self._cache[index] = found
                self._room -= found.nbytes
        return found

    def __getitem__(self, draw: Draw) -> tuple[Draw, Sample, Clip | None, list[str]]:
        """The drawn sample; in training, a broken one is replaced by the next that decodes, and named."""
        bad = []
        for attempt in range(_ATTEMPTS if self.training else 1):
            index = (draw.row + attempt) % len(self.shards)
            row = self.shards.rows[index]
            shown = index if self.video_of is None else self.video_of[index]
            try:
                frames = self.frames(self.shards.rows[shown], shown, draw.seed)
            except (DecodeError, OSError) as error:
                bad.append(f"{row.sample.id} in {self.shards.paths[row.shard].name}: {error}")
                continue
            if attempt:
                draw = Draw(index, None, draw.seed)
            return draw, row.sample, frames, bad
        return draw, self.shards.rows[draw.row].sample, None, bad

    def __len__(self) -> int:
        return len(self.shards)


class Collate:
    """Joins the clips and lets every task take its part."""

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

    def __call__(self, items: Sequence[tuple[Draw, Sample, Clip | None, list[str]]]) -> dict[str, Any]:
        good = [(draw, sample, frames) for draw, sample, frames, _ in items if frames is not None]
        batch: dict[str, Any] = {
            "ids": [sample.id for _, sample, _ in good],
            "rows": [draw.row for draw, _, _ in good],
            "bad": [name for *_, bad in items for name in bad],
        }
        if not good:
            return batch
        clips, slots = [], []
        mask = np.zeros((len(good), self.frames), bool)
        for place, (draw, _, clip) in enumerate(good):
            if self.shuffle_seed is not None:
                clip = clip[np.random.default_rng((self.shuffle_seed, draw.row)).permutation(len(clip))]
            clips.append(clip)
            slots.append(place * self.frames + np.arange(len(clip)))
            mask[place, : len(clip)] = True
        batch["frames"] = torch.from_numpy(np.concatenate(clips))
        batch["frame_slot"] = torch.from_numpy(np.concatenate(slots))
        batch["video_mask"] = torch.from_numpy(mask)
        if self.augmentation is not None:
            _, height, width, _ = clips[0].shape
            seeds = [draw.seed for draw, _, _ in good]
            batch["augment"] = self.augmentation.plan(seeds, list(map(len, clips)), height, width)
        samples, draws = [sample for _, sample, _ in good], [draw for draw, _, _ in good]
        batch["tasks"] = {name: collator(samples, draws) for name, collator in self.collators.items()}
        return batch


def training_loader(
    shards: ShardSet,
    data: DataConfig,
    batches: RankBatches,
    collators: Mapping[str, Collator],
    features: FeatureStore | None = None,
) -> DataLoader[Any]:
    """Of which `data/steps.py` takes a step's batches; it looks after the workers every LOOK seconds."""
    clips = Clips(shards, data, training=True, features=features)
    # remembered features are of frames as they are
    collate = Collate(
        collators, frames=data.frames, augmentation=augmentation(data.augment) if features is None else None
    )
    return _loader(clips, data, batches, collate, look=LOOK if data.workers else 0)


def evaluation_loader(
    shards: ShardSet,
    data: DataConfig,
    collators: Mapping[str, Collator],
    *,
    batch_size: int,
    rank: int,
    world_size: int,
    rows: Sequence[int] | None = None,
    shuffle_seed: int | None = None,
    swap_seed: int | None = None,
    features: FeatureStore | None = None,
) -> DataLoader[Any]:
    """Every sample (or those of `rows`) exactly once over all ranks.

    With `shuffle_seed`, each video's frames in a random order; with `swap_seed`, each sample with another's video.
    """
    wanted = range(len(shards)) if rows is None else rows
    mine = [Draw(row, None, row) for row in wanted[rank::world_size]]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    collate = Collate(collators, frames=data.frames, shuffle_seed=shuffle_seed)
    video_of = None
    if swap_seed is not None:
        ring = random.Random(swap_seed).sample(range(len(shards)), len(shards))
        video_of = [0] * len(shards)
        for place, row in enumerate(ring):  # the next in a ring: nobody keeps their own
            video_of[row] = ring[(place + 1) % len(ring)]
    return _loader(Clips(shards, data, training=False, features=features, video_of=video_of), data, batches, collate)


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
    """Adds what the clips of a batch took to load; beside the data set in the loader's process."""

    def __init__(self, clips: Clips, collate: Collate) -> None:
        self.clips, self.collate = clips, collate

    def __call__(self, items: Any) -> dict[str, Any]:
        spent, self.clips.spent = self.clips.spent, LoadingTime()
        return {**self.collate(items), "loading": astuple(spent)}
