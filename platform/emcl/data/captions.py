"""A batch's captions as input of the text tower: one per sample in training, all of them in evaluation.

The input is token ids, or the cached outputs of a frozen text tower (data/split.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from emcl.data.sampler import Draw
from emcl.data.samples import Sample

Tokenizer = Callable[[list[str]], Tensor]
"""Texts -> (n, L) token ids; L is the length of the longest text, or a fixed length."""


class Caption(NamedTuple):
    """One caption of one sample."""

    row: int
    number: int
    """Index among the sample's captions."""
    text: str


class TextSource(Protocol):
    """Makes the input of `Backbone.encode_text`."""

    def text(self, captions: Sequence[Caption]) -> Tensor:
        """One row per caption."""
        ...

    def filler(self) -> Tensor:
        """One dummy text, for a rank that has nothing to encode while other ranks do."""
        ...


@dataclass(frozen=True)
class Tokens:
    """(n, L) token ids."""

    tokenize: Tokenizer

    def text(self, captions: Sequence[Caption]) -> Tensor:
        return self.tokenize([caption.text for caption in captions])

    def filler(self) -> Tensor:
        return self.tokenize([""])


@dataclass
class Captions:
    """One caption per sample."""

    text: Tensor
    """Input of `Backbone.encode_text`, (B, ...)."""
    present_B: Tensor
    """Which samples have a caption."""


@dataclass
class DrawnCaptions:
    """A collator that takes the drawn caption of each sample."""

    texts: TextSource

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> Captions:
        captions = [pick_caption(*pair) for pair in zip(samples, draws, strict=True)]
        present = torch.tensor([caption is not None for caption in captions])
        if not present.any():
            return Captions(self.texts.filler().expand(len(captions), -1), present)
        spare = next(caption for caption in captions if caption is not None)
        return Captions(self.texts.text([caption or spare for caption in captions]), present)


@dataclass
class EveryCaption:
    """All captions of a batch's samples."""

    text: Tensor | None
    """Input of `Backbone.encode_text`; None if no sample has a caption."""
    rows: list[int]
    """Each caption's sample, as a row of the shards."""


@dataclass
class AllCaptions:
    """A collator that takes every caption of each sample."""

    texts: TextSource

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> EveryCaption:
        captions = [caption for pair in zip(samples, draws, strict=True) for caption in every_caption(*pair)]
        text = self.texts.text(captions) if captions else None
        return EveryCaption(text, [caption.row for caption in captions])


def pick_caption(sample: Sample, draw: Draw) -> Caption | None:
    """The caption that the draw names; if it names none, a random one."""
    if not sample.captions:
        return None
    index = draw.caption
    if index is None:
        index = random.Random(draw.seed).randrange(len(sample.captions))
    return Caption(draw.row, index, sample.captions[index])


def every_caption(sample: Sample, draw: Draw) -> list[Caption]:
    return [Caption(draw.row, index, text) for index, text in enumerate(sample.captions)]
