"""One of a run's splits: its samples, their order in training, their captions and frames as the model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emcl.data.features import Feature, read_features
from emcl.data.mixture import open_training
from emcl.data.order import BatchOrder
from emcl.data.samples import Sample
from emcl.data.settings import DataConfig
from emcl.data.shards import ShardSet, open_shards
from emcl.data.text import Caption, Tokenizer, Tokens


@dataclass(frozen=True)
class Split:
    """Made by `open_split` or `open_training_split`; the same on every rank, and safe to hand to loader processes.

    It is the `TextSource` of its captions: token ids, or remembered outputs of a frozen text tower.
    """

    shards: ShardSet
    tokens: Tokens | None = None
    """None where frames alone are wanted."""
    order: BatchOrder | None = None
    """Of training: which samples form global batch i."""
    features: Sequence[Feature] | None = None
    """Remembered outputs of both frozen towers, a sample each."""

    def __len__(self) -> int:
        return len(self.shards)

    def sample(self, row: int) -> Sample:
        return self.shards.rows[row].sample

    def with_features(self, paths: Sequence[Path]) -> Split:
        """From the files of remembered features, one a shard."""
        features = [feature for path in paths for feature in read_features(path)]
        assert len(features) == len(self)
        return replace(self, features=features)

    def remembered_frames(self, row: int) -> NDArray[np.float32] | None:
        """(n, W) outputs of the frozen image trunk for a sample's frames, if they are remembered."""
        return None if self.features is None else self.features[row]["frames"].float().numpy()

    def text(self, captions: Sequence[Caption]) -> Tensor:
        """What `Backbone.encode_text` takes, a row for each caption."""
        if self.features is None:
            assert self.tokens is not None
            return self.tokens.text(captions)
        return torch.stack([self.features[caption.row]["captions"][caption.number] for caption in captions]).float()

    def filler(self) -> Tensor:
        """One text of no meaning, for a rank that has nothing to encode while others do."""
        if self.features is None:
            assert self.tokens is not None
            return self.tokens.filler()
        return torch.zeros(1, self.features[0]["captions"].shape[1])

    def black_frame(self, size: int) -> Tensor:
        """One frame of no meaning, as `VideoFrames.frames` has it."""
        if self.features is None:
            return torch.zeros(1, size, size, 3, dtype=torch.uint8)
        return torch.zeros(1, self.features[0]["frames"].shape[1])


def open_split(pattern: str, tokenizer: Tokenizer | None = None) -> Split:
    """Of validation or test.

    Raises:
        UserError: shards that are missing or damaged.
    """
    return Split(open_shards(pattern), Tokens(tokenizer) if tokenizer else None)


def open_training_split(data: DataConfig, seed: int, tokenizer: Tokenizer | None = None) -> Split:
    """All sets of `data` as one, with the order of their global batches.

    Raises:
        UserError: shards that are missing or damaged, or too few samples for a batch.
    """
    shards, order = open_training(data, seed)
    return Split(shards, Tokens(tokenizer) if tokenizer else None, order)
