"""Scores a model on a split: every video encoded once, every task fed from that encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from emcl.config import Config
from emcl.data.bad_samples import check_bad_fraction
from emcl.data.batch import Batch, VideoFrames
from emcl.data.loader import evaluation_loader
from emcl.data.split import Split
from emcl.data.workers import start_workers
from emcl.distributed import Ranks
from emcl.multitask import VideoLanguageModel, collators
from emcl.task import Evaluation, Lockstep, Scorer, Scores


@torch.no_grad()
def evaluate(
    model: VideoLanguageModel,
    split: Split,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    *,
    name: str,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """Scores of each task, the same on every rank; each sample counts exactly once; `progress` is called each batch.

    All ranks make the same number of forward passes, since each of them is a collective under ZeRO-3.

    Raises:
        UserError: more samples than `data.max_bad_fraction` allows do not decode; lists them.
    """
    scorers = collect(model, split, config, ranks, device, name=name, progress=progress)
    scores = {key: scorer.result() for key, scorer in scorers.items()}
    control = _control(config)
    return {key: replace(item, protocol=item.protocol + control) for key, item in scores.items()}


@torch.no_grad()
def collect(
    model: VideoLanguageModel,
    split: Split,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    *,
    name: str,
    rows: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Scorer]:
    """Encodes every sample (or `rows`) and lets the tasks' scorers (or those of `only`) take what they need.

    Raises:
        UserError: as `evaluate`.
    """
    loader = evaluation_loader(
        split,
        config.data,
        collators(config, split, training=False, only=only),
        batch_size=config.evaluate.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        rows=rows,
        shuffle_seed=config.seed if config.evaluate.shuffle_frames else None,
        swap_seed=config.seed if config.evaluate.swap_videos else None,
    )
    scorers = dict(_scorers(model, split, config, ranks, device, only))
    bad: list[str] = []
    nothing = _nothing(split, config)
    batches = start_workers(loader, ranks.rank)
    steps = int(ranks.maximum(torch.tensor(len(loader), device=device)))
    for _ in tqdm(range(steps), desc=f"evaluating on {name}", unit="batch", leave=False, disable=not ranks.first):
        batch: Batch = next(batches, nothing)
        bad += batch.bad
        batch = (nothing if batch.videos is None else batch).to(device)
        encoded = model(call=partial(model.encode, batch))
        for key, scorer in scorers.items():
            scorer.update(encoded, batch.tasks.get(key), batch.rows)
        progress()
    _check_bad([item for of_rank in ranks.gather_objects(bad) for item in of_rank], len(split), config)
    return scorers


def _scorers(
    model: VideoLanguageModel,
    split: Split,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    only: Sequence[str] | None,
) -> Iterator[tuple[str, Scorer]]:
    lockstep = Lockstep(model, ranks, 4 * config.evaluate.batch_size, device)
    for name, task in model.heads.items():
        if only is None or name in only:
            evaluation = Evaluation(name, model, model.backbone, split, config, ranks, device, lockstep)
            yield name, task.scorer_class(task, evaluation)


def split_name(split: str, config: Config) -> str:
    """The split's name in file names; evaluations that are controls have a suffix."""
    shuffled = "-shuffled" if config.evaluate.shuffle_frames else ""
    return split + shuffled + ("-swapped" if config.evaluate.swap_videos else "")


def _control(config: Config) -> str:
    """The protocol's note on an evaluation that is a control; else empty."""
    shuffled = "; frames shuffled" if config.evaluate.shuffle_frames else ""
    return shuffled + ("; CONTROL: each sample with another's video" if config.evaluate.swap_videos else "")


def _nothing(split: Split, config: Config) -> Batch:
    """A filler of one black frame, for a rank that has run out of samples."""
    mask = torch.zeros(1, config.data.frames, dtype=torch.bool)
    mask[0, 0] = True
    slots = torch.zeros(1, dtype=torch.long)
    videos = VideoFrames(frames=split.black_frame(config.data.image_size), slots=slots, mask_BT=mask)
    return Batch(ids=[], rows=[], videos=videos)


def _check_bad(bad: list[str], total: int, config: Config) -> None:
    check_bad_fraction(bad, total, config.data.max_bad_fraction, "videos do not decode")
    for item in bad:
        tqdm.write(f"left out of the evaluation: {item}")
