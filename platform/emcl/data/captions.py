"""A batch's captions as the text tower's input: one drawn of each sample in training, all of them in evaluations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emcl.data.order import Draw
from emcl.data.samples import Sample
from emcl.data.text import Caption, TextSource


@dataclass
class Captions:
    """One caption a sample."""

    text: Tensor
    """What `Backbone.encode_text` takes, (B, ...)."""
    present_B: Tensor
    """Which samples have any."""


@dataclass
class DrawnCaptions:
    """A collator: of each sample the draw's caption."""

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
    """What `Backbone.encode_text` takes; None where there is no caption."""
    rows: list[int]
    """Of the shards: the sample that each caption is of."""


@dataclass
class AllCaptions:
    """A collator: every caption of each sample."""

    texts: TextSource

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> EveryCaption:
        captions = [caption for pair in zip(samples, draws, strict=True) for caption in every_caption(*pair)]
        text = self.texts.text(captions) if captions else None
        return EveryCaption(text, [caption.row for caption in captions])


def pick_caption(sample: Sample, draw: Draw) -> Caption | None:
    """The draw's caption of a sample; one at random where it names none."""
    if not sample.captions:
        return None
    index = draw.caption
    if index is None:
        index = random.Random(draw.seed).randrange(len(sample.captions))
    return Caption(draw.row, index, sample.captions[index])


def every_caption(sample: Sample, draw: Draw) -> list[Caption]:
    return [Caption(draw.row, index, text) for index, text in enumerate(sample.captions)]
