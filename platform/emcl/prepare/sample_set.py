"""The generated sample set, which needs no download.

    emcl prepare sample --out shards/sample

renders 2,000 / 200 / 500 clips for train / val / test. The scenes of val and test are never seen in training.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from emcl.data.samples import Sample
from emcl.prepare import scenes
from emcl.prepare.render import FPS, render
from emcl.prepare.scenes import Scene
from emcl.prepare.writer import encode_mp4, write_shard

SPLITS = {"train": 2000, "val": 200, "test": 500}
SINGLE_SHARE = 0.25
SHARD_SIZE = 500


@dataclass(frozen=True)
class Clip:
    """One clip to render; it is fully determined by these fields."""

    id: str
    split: str
    scene: Scene
    seed: int


def plan(counts: dict[str, int], seed: int) -> list[Clip]:
    """Assigns a scene to each clip. Scenes of val and test are distinct and held out of training.

    Twins (scenes that differ only in temporal order) go to the same split, so that a test video is ranked against its
    twin. They are neighbours in the shards, so that a small shuffle buffer puts them into the same training batch;
    otherwise a model would have no incentive to learn temporal order.
    """
    rng = random.Random(seed)
    chosen: dict[str, list[list[Scene]]] = {split: [] for split in counts}
    for pool, share in ((scenes.single_scenes(), SINGLE_SHARE), (scenes.double_scenes(), 1 - SINGLE_SHARE)):
        families = scenes.families(pool)
        rng.shuffle(families)
        for split in ("test", "val"):
            chosen.setdefault(split, []).extend(_take(families, round(counts.get(split, 0) * share)))
        wanted = round(counts["train"] * share)
        while wanted > 0:  # reuses scenes until there are enough
            taken = _take(list(families), wanted)
            chosen["train"] += taken
            wanted -= sum(map(len, taken))
            rng.shuffle(families)
    for split in chosen:
        rng.shuffle(chosen[split])
    return [
        Clip(f"{split}{index:05d}", split, scene, rng.getrandbits(48))
        for split in counts
        for index, scene in enumerate(itertools.chain.from_iterable(chosen[split]))
    ]


def _take(families: list[list[Scene]], wanted: int) -> list[list[Scene]]:
    """Removes and returns the first families with `wanted` scenes in total; the last may be truncated."""
    taken: list[list[Scene]] = []
    while wanted > 0 and families:
        family = families.pop(0)[:wanted]
        taken.append(family)
        wanted -= len(family)
    return taken


def make_clip(clip: Clip) -> tuple[Sample, str, bytes]:
    """Renders and encodes one clip, with its captions and questions."""
    words, pixels = random.Random(clip.seed), np.random.default_rng(clip.seed)
    background = words.choice(scenes.BACKGROUNDS)
    sample = Sample(
        id=clip.id,
        source="sample",
        split=clip.split,
        captions=scenes.captions(clip.scene, words),
        qa=scenes.questions(clip.scene, background),
    )
    return sample, "mp4", encode_mp4(render(clip.scene, background, pixels), FPS)


def shards(clips: list[Clip], shard_size: int) -> Iterator[tuple[str, list[Clip]]]:
    """Yields (file name, clips) in order."""
    for split in dict.fromkeys(clip.split for clip in clips):
        chosen = [clip for clip in clips if clip.split == split]
        for number, start in enumerate(range(0, len(chosen), shard_size)):
            yield f"{split}-{number:06d}.tar", chosen[start : start + shard_size]


def generate(
    folder: Path,
    *,
    counts: dict[str, int] | None = None,
    seed: int = 0,
    shard_size: int = SHARD_SIZE,
    processes: int | None = None,
    progress: bool = True,
) -> None:
    """Writes the sample set to `folder`, byte-identical for the same seed. Existing shards are kept."""
    tasks = list(shards(plan(counts or SPLITS, seed), shard_size))
    missing = [task for task in tasks if not (folder / task[0]).exists()]
    # clips are written in order as workers finish them, so that the progress bar moves with every clip
    with ProcessPoolExecutor(processes or cpu_count(), mp_context=get_context("spawn")) as pool:
        bar = tqdm(
            total=sum(len(clips) for _, clips in missing),
            desc="rendering the sample set",
            unit="clip",
            disable=not progress,
        )
        with bar:
            for name, clips in missing:
                rendered = pool.map(make_clip, clips, chunksize=8)
                write_shard(folder / name, _counted(rendered, bar))


def _counted(items: Iterator[tuple[Sample, str, bytes]], bar: tqdm[Any]) -> Iterator[tuple[Sample, str, bytes]]:
    for item in items:
        bar.update()
        yield item


__all__ = ["SPLITS", "Clip", "generate", "make_clip", "plan"]
