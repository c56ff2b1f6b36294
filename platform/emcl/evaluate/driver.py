"""Scores a model on a split: every video encoded once, every task fed from that encoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emcl.config import Config
from emcl.data.loader import evaluation_loader
from emcl.data.source import Source
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.backbone import Encoded
from emcl.task import Scores, Task, to_device

Forward = Callable[..., Any]
"""The engine or the bare model: (batch, part=...)."""


@torch.no_grad()
def evaluate(
    forward: Forward,
    tasks: Mapping[str, Task],
    source: Source,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    *,
    name: str,
) -> dict[str, Scores]:
    """Scores of each task, the same on every rank; each sample counts exactly once.

    All ranks make the same number of forward passes, since each of them is a collective under ZeRO-3.

    Raises:
        UserError: more samples than `data.max_bad` allows do not decode; names the first.
    """
    shards, texts = source.shards, source.texts
    collators = {key: type(task).collator(config.tasks[key], texts, training=False) for key, task in tasks.items()}
    loader = evaluation_loader(
        shards,
        config.data,
        collators,
        batch_size=config.evaluate.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        shuffle_seed=config.seed if config.evaluate.shuffle_frames else None,
        features=source.features,
    )
    scorers = {key: task.scorer(config) for key, task in tasks.items()}
    bad: list[str] = []
    batches = iter(loader)
    steps = int(ranks.maximum(torch.tensor(len(loader), device=device)))
    for _ in tqdm(range(steps), desc=f"evaluating on {name}", unit="batch", leave=False, disable=not ranks.first):
        batch: dict[str, Any] = next(batches, {"bad": []})
        bad += batch["bad"]
        real = "frames" in batch
        batch = to_device(batch if real else {**batch, **_nothing(source, config)}, device)
        frames_BTD = forward(batch, part="video")
        encoded = Encoded(frames_BTD, batch["video_mask"])
        encode = _TextEncoder(forward, ranks, 4 * config.evaluate.batch_size, texts.filler().to(device))
        for scorer in scorers.values():
            if real:
                scorer.add(encoded, batch, encode)
            else:
                encode(None)
    _check_bad([item for part in ranks.gather_objects(bad) for item in part], len(shards), config)
    return {key: scorer.result(ranks, lambda row: shards.rows[row].sample.captions) for key, scorer in scorers.items()}


class _TextEncoder:
    """Encodes any number of texts in chunks; all ranks take as many chunks as the one with most."""

    def __init__(self, forward: Forward, ranks: Ranks, size: int, filler: Tensor) -> None:
        self.forward, self.ranks, self.size, self.filler = forward, ranks, size, filler

    def __call__(self, text: Tensor | None) -> Tensor | None:
        mine = [] if text is None else list(text.split(self.size))
        chunks = int(self.ranks.maximum(torch.tensor(len(mine), device=self.filler.device)))
        padded = [*mine, *[self.filler] * (chunks - len(mine))]
        done = [self.forward({"text": part}, part="text") for part in padded]
        return torch.cat(done[: len(mine)]) if mine else None


def _nothing(source: Source, config: Config) -> dict[str, Tensor]:
    """One black frame, for a rank that has run out of samples."""
    mask = torch.zeros(1, config.data.frames, dtype=torch.bool)
    mask[0, 0] = True
    side = config.data.size
    if source.features is not None:
        frames = torch.zeros(1, source.features.width)
    else:
        frames = torch.zeros(1, side, side, 3, dtype=torch.uint8)
    return {"frames": frames, "frame_slot": torch.zeros(1, dtype=torch.long), "video_mask": mask}


def _check_bad(bad: list[str], total: int, config: Config) -> None:
    if len(bad) > config.data.max_bad * total:
        raise UserError(
            f"{len(bad)} of {total} videos do not decode, more than data.max_bad={config.data.max_bad} allows; "
            f"the first: {bad[0]}"
        )
    for item in bad:
        tqdm.write(f"left out of the evaluation: {item}")
