"""A split of a run: its samples, their order in training, and their captions and frames as model inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emcl.data.captions import Caption, Tokenizer, Tokens
from emcl.data.data_settings import DataConfig
from emcl.data.mixture import open_training
from emcl.data.sampler import BatchSampler
from emcl.data.samples import Sample
from emcl.data.shards import ShardSet, open_shards

Feature = dict[str, Tensor]
"""Features of one sample: `frames` (n, W) and `captions` (c, W')."""


@dataclass(frozen=True)
class Split:
    """Made by `open_split` or `open_training_split`; the same on every rank. Can be passed to loader processes.

    It is the `TextSource` of its captions: token ids, or cached outputs of a frozen text tower.
    """

    shards: ShardSet
    tokens: Tokens | None = None
    """None if only frames are needed."""
    sampler: BatchSampler | None = None
    """For training: which samples form global batch i."""
    features: Sequence[Feature] | None = None
    """Cached outputs of both frozen towers, one entry per sample (model/feature_cache.py)."""

    def __len__(self) -> int:
        return len(self.shards)

    def sample(self, row: int) -> Sample:
        return self.shards.rows[row].sample

    def remembered_frames(self, row: int) -> NDArray[np.float32] | None:
        """(n, W) cached outputs of the frozen image trunk for a sample's frames; None if not cached."""
        return None if self.features is None else self.features[row]["frames"].float().numpy()

    def text(self, captions: Sequence[Caption]) -> Tensor:
        """Input of `Backbone.encode_text`, one row per caption."""
        if self.features is None:
            assert self.tokens is not None
            return self.tokens.text(captions)
        return torch.stack([self.features[caption.row]["captions"][caption.number] for caption in captions]).float()

    def filler(self) -> Tensor:
        """One dummy text, for a rank that has nothing to encode while other ranks do."""
        if self.features is None:
            assert self.tokens is not None
            return self.tokens.filler()
        return torch.zeros(1, self.features[0]["captions"].shape[1])

    def black_frame(self, size: int) -> Tensor:
        """One dummy frame, in the format of `VideoFrames.frames`."""
        if self.features is None:
            return torch.zeros(1, size, size, 3, dtype=torch.uint8)
        return torch.zeros(1, self.features[0]["frames"].shape[1])


def open_split(pattern: str, tokenizer: Tokenizer | None = None) -> Split:
    """Opens a validation or test split.

    Raises:
        UserError: shards that are missing or damaged.
    """
    return Split(open_shards(pattern), Tokens(tokenizer) if tokenizer else None)


def open_training_split(data: DataConfig, seed: int, tokenizer: Tokenizer | None = None) -> Split:
    """Opens all training sets of `data` as one split, with the sampler of global batches.

    Raises:
        UserError: shards that are missing or damaged, or too few samples for a batch.
    """
    shards, sampler = open_training(data, seed)
    return Split(shards, Tokens(tokenizer) if tokenizer else None, sampler)
