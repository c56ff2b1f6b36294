"""Scores a model on a split: every video encoded once, every task fed from that encoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from tqdm import tqdm

from emcl.config import Config
from emcl.data.bad_samples import check_bad_fraction
from emcl.data.batch import Batch, VideoFrames
from emcl.data.loader import Collator, evaluation_loader
from emcl.data.split import Split
from emcl.data.workers import start_workers
from emcl.distributed import Ranks
from emcl.em import SharedFactors
from emcl.model.backbone import Encoded
from emcl.model.pair_scores import weight_of
from emcl.multitask import VideoLanguageModel, collators
from emcl.task import Evaluation, Lockstep, Scorer, Scores
from emcl.task.prediction import log_odds_scale_of


@torch.no_grad()
def evaluate(
    model: VideoLanguageModel,
    split: Split,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    *,
    name: str,
    factors: SharedFactors | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Scores]:
    """Scores of each task, the same on every rank; each sample counts exactly once; `progress` is called each batch.

    All ranks make the same number of forward passes, since each of them is a collective under ZeRO-3.

    Args:
        factors: the model's, on the device, for the tasks that compare.

    Raises:
        UserError: more samples than `data.max_bad_fraction` allows do not decode; lists them.
    """
    scorers = collect(model, split, config, ranks, device, name=name, factors=factors, progress=progress)
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
    factors: SharedFactors | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Scorer]:
    """Encodes every sample (or `rows`) and lets the tasks' scorers (or those of `only`) take what they need.

    Raises:
        UserError: as `evaluate`.
    """
    scorers = dict(_scorers(model, split, config, ranks, device, only, factors))
    batches = encoded_batches(
        model,
        split,
        config,
        ranks,
        device,
        collators(config, split, training=False, only=only),
        doing=f"evaluating on {name}",
        rows=rows,
        with_outputs=factors is not None,
        progress=progress,
    )
    for encoded, batch in batches:
        for key, scorer in scorers.items():
            scorer.update(encoded, batch.tasks.get(key), batch.rows)
    return scorers


@torch.no_grad()
def encoded_batches(
    model: VideoLanguageModel,
    split: Split,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    collate: Mapping[str, Collator],
    *,
    doing: str,
    rows: Sequence[int] | None = None,
    with_outputs: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Encoded, Batch]]:
    """This rank's batches of every sample (or `rows`), as many as the rank with most has.

    One that has run out of samples gets fillers, which have neither rows nor the collators' parts.

    Args:
        doing: title of the progress bar.

    Raises:
        UserError: as `evaluate`, at the end.
    """
    loader = evaluation_loader(
        split,
        config.data,
        collate,
        batch_size=config.evaluate.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        rows=rows,
        shuffle_seed=config.seed if config.evaluate.shuffle_frames else None,
        swap_seed=config.seed if config.evaluate.swap_videos else None,
    )
    bad: list[str] = []
    nothing = _nothing(split, config)
    batches = start_workers(loader, ranks.rank)
    steps = int(ranks.maximum(torch.tensor(len(loader), device=device)))
    for _ in tqdm(range(steps), desc=doing, unit="batch", leave=False, disable=not ranks.first):
        batch: Batch = next(batches, nothing)
        bad += batch.bad
        batch = (nothing if batch.videos is None else batch).to(device)
        yield model(call=partial(model.encode, batch, with_outputs=with_outputs)), batch
        progress()
    asked = len(split) if rows is None else len(rows)
    _check_bad([item for of_rank in ranks.gather_objects(bad) for item in of_rank], asked, config)


def without_controls(config: Config) -> Config:
    """For samples that a score is made with, and not of: with their own videos, and the frames in order."""
    return replace(config, evaluate=replace(config.evaluate, shuffle_frames=False, swap_videos=False))


def _scorers(
    model: VideoLanguageModel,
    split: Split,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    only: Sequence[str] | None,
    factors: SharedFactors | None,
) -> Iterator[tuple[str, Scorer]]:
    lockstep = Lockstep(model, ranks, 4 * config.evaluate.batch_size, device)
    for name, task in model.heads.items():
        if only is None or name in only:
            counts = factors is not None and log_odds_scale_of(task) is not None and weight_of(factors, name) > 0
            own = factors if counts else None
            evaluation = Evaluation(name, model, model.backbone, split, config, ranks, device, lockstep, own)
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
        tqdm.write(f"left out: {item}")
