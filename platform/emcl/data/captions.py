"""A batch's captions as the text tower's input: one drawn of each sample in training, all of them in evaluations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emcl.data.order import Draw
from emcl.data.samples import Sample
from emcl.data.text import Caption, TextSource


@dataclass
class DrawnCaptions:
    """A collator: `text`, one caption a sample, and `present`, which samples have any."""

    texts: TextSource

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> dict[str, Any]:
        captions = [pick_caption(*pair) for pair in zip(samples, draws, strict=True)]
        present = torch.tensor([caption is not None for caption in captions])
        if not present.any():
            return {"text": self.texts.filler().expand(len(captions), -1), "present": present}
        spare = next(caption for caption in captions if caption is not None)
        return {"text": self.texts([caption or spare for caption in captions]), "present": present}


@dataclass
class AllCaptions:
    """A collator: `text`, every caption of each sample, or None without any; and `rows`, each one's sample."""

    texts: TextSource

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> dict[str, Any]:
        captions = [caption for pair in zip(samples, draws, strict=True) for caption in every_caption(*pair)]
        return {"text": self.texts(captions) if captions else None, "rows": [caption.row for caption in captions]}


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
