"""Trains and scores one model of the ablation, in a separate process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ablation_data import train_to_the_end
from emcl.config import Config, resolve
from emcl.data.batch import videos_of
from emcl.data.captions import Caption, every_caption
from emcl.data.sampler import Draw
from emcl.data.split import open_split
from emcl.distributed import ALONE
from emcl.metrics.rescoring import DualSoftmax
from emcl.metrics.retrieval_metrics import Rescore, text_to_video_ranks, unchanged, video_to_text_ranks
from emcl.model.backbone import tokenizer_of
from emcl.model.embeddings import Embeddings
from emcl.model.emcl_layer import EMCLLayer
from emcl.model.feature_cache import with_features
from emcl.model.similarity import similarity
from emcl.multitask import VideoLanguageModel
from emcl.report.options import reference_module
from emcl.run_folder import WEIGHTS, RunFolder

TILE = 32
"""Side of the text x video tiles that the reference EM uses, as published."""
ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Job:
    """One model to train, if it does not exist yet."""

    name: str
    recipe: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def export(self) -> Path:
        return RunFolder(self.folder / self.name).best

    def config(self) -> Config:
        return resolve(["retrieval"], self.recipe, self._settings())

    def _settings(self) -> list[str]:
        own = [f"runs={self.folder}", f"name={self.name}", "data.val=null", "data.test=null", "tracking.enabled=false"]
        return [*self.overrides, "emcl.factors=0", *own]


def train(job: Job) -> Path:
    """Trains with the platform's own loop and returns the export; output goes to the run's `log.txt`."""
    if not (job.export / WEIGHTS).is_file():
        (job.folder / job.name).mkdir(parents=True, exist_ok=True)
        with _output_to(job.folder / job.name / "log.txt"):
            train_to_the_end(RunFolder(job.folder / job.name), job.recipe, job._settings())
    return job.export


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    kept = [os.dup(1), os.dup(2)]
    with path.open("w") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, stream)
                os.close(saved)


@torch.no_grad()
def embed(model: VideoLanguageModel, config: Config, shards: str, captions: int | None = None) -> Embeddings:
    """Embeddings of the shards' cached features, with at most `captions` captions per video."""
    split = open_split(shards, tokenizer_of(config))
    split = with_features(split, config, model.backbone, ALONE, torch.device("cpu"))
    frames, mask, text = [], [], []
    every: list[Caption] = []
    count = len(split)
    for first in range(0, count, ROWS_AT_ONCE):
        rows = range(first, min(count, first + ROWS_AT_ONCE))
        clips = [clip for clip in map(split.remembered_frames, rows) if clip is not None]
        videos = videos_of(clips, config.data.frames)
        frames.append(model.backbone.encode_video(videos))
        mask.append(videos.mask_BT)
        block_captions = [
            caption for row in rows for caption in every_caption(split.sample(row), Draw(row, None, 0))[:captions]
        ]
        text.append(model.backbone.encode_text(split.text(block_captions)))
        every += block_captions
    return Embeddings(
        torch.cat(text), torch.cat(frames), torch.cat(mask), np.array([caption.row for caption in every]),
        [caption.text for caption in every], [row.sample.id for row in split.shards.rows],
    )  # fmt: skip


# --- ways to score one model


@torch.no_grad()
def plain(model: Any, split: Embeddings) -> NDArray[np.float32]:
    """(texts, videos) without any EMCL."""
    return _similarity(model, split, None)


@torch.no_grad()
def with_own_layer(model: Any, split: Embeddings) -> NDArray[np.float32]:
    """With the layer the model was trained with: the reference in tiles, the compact variant on any size."""
    task = model.heads["retrieval"]
    return task.similarity_in_tiles(split.text, split.frames, split.mask, TILE, ALONE, task.emcl)


@torch.no_grad()
def with_fitted(model: Any, split: Embeddings, layer: EMCLLayer) -> NDArray[np.float32]:
    """With a compact layer fitted on training features, used only at inference."""
    return _similarity(model, split, layer)


@torch.no_grad()
def with_reference(
    model: Any, split: Embeddings, *, bases: int, iterations: int, temperature: float, beta: float
) -> NDArray[np.float32]:
    """The published inference module: EM over the unit rows of each tile of texts and videos."""
    pooling = model.heads["retrieval"].settings.pooling_temperature
    settings = {"bases": bases, "iterations": iterations, "temperature": temperature, "beta": beta}
    return reference_module(split.text, split.frames, split.mask, pooling=pooling, tile=TILE, **settings)


def fitted(split: Embeddings, **settings: Any) -> EMCLLayer:
    """Fits a compact layer on a training split's videos (means of frames) and texts."""
    return EMCLLayer(variant="compact", **settings).fit(split.video_means, split.text).eval()


def _similarity(model: Any, split: Embeddings, layer: EMCLLayer | None) -> NDArray[np.float32]:
    temperature = model.heads["retrieval"].settings.pooling_temperature
    return similarity(split.text, split.frames, split.mask, temperature=temperature, regulariser=layer).numpy()


# --- what is measured


@dataclass(frozen=True)
class Measured:
    """Result of one scoring method for one model and split."""

    text_to_video: NDArray[np.int64]
    """Rank of each text's video."""
    video_to_text: NDArray[np.int64]
    """Rank of each video's texts."""
    owner: NDArray[np.int64]
    gap: float
    effective_rank: float

    @property
    def recall(self) -> float:
        """R@1, the mean of both directions."""
        return 50 * float((self.text_to_video == 1).mean() + (self.video_to_text == 1).mean())


def measure(
    scores: NDArray[np.float32], split: Embeddings, correct: Callable[[Tensor, Tensor], Sequence[Tensor]], *, dsl: bool
) -> Measured:
    """Ranks both ways, and the geometry of mean-pooled videos and texts after `correct(videos, texts)`."""
    rescore: Rescore = DualSoftmax() if dsl else unchanged
    video, text = (F.normalize(rows, dim=1) for rows in correct(split.video_means, split.text))
    return Measured(
        text_to_video_ranks(scores, split.owner, rescore=rescore),
        video_to_text_ranks(scores, split.owner, rescore=rescore),
        split.owner,
        float((video.mean(0) - text.mean(0)).norm()),
        effective_rank(torch.cat([video, text])),
    )


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of the singular values of the centred rows (Roy and Vetterli, 2007)."""
    values = torch.linalg.svdvals(rows - rows.mean(0))
    share = values / values.sum()
    return float(torch.exp(-(share * share.clamp_min(1e-12).log()).sum()))
