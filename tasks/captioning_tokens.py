"""References as the decoder's input: their vocabulary, and those that a training step draws."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from emcl.tasks.task_settings import CaptioningConfig
from torch import Tensor

from emcl.data.sampler import Draw
from emcl.data.samples import Sample
from emcl.data.vocabulary import UsedTokens, Vocabulary, WholeVocabulary
from emcl.errors import UserError

IGNORED = -100
"""A label that the cross-entropy leaves out."""


def open_vocabulary(settings: CaptioningConfig) -> Vocabulary:
    """Raises UserError: it is not known yet, or its tokenizer is missing."""
    if settings.pretrained is not None:
        return WholeVocabulary(settings.tokenizer or settings.pretrained)
    if settings.vocabulary is None:
        raise UserError("vocabulary is not set: it is found from the captions of data.train")
    return UsedTokens.open(settings.tokenizer, settings.vocabulary)


@dataclass
class References:
    """N captions of a batch as token ids, of which K are learnt."""

    ids_NL: Tensor
    video_N: Tensor
    """Each one's video, as its index in the batch."""
    learnt_K: Tensor
    """The indices in the flattened ids at which the next token is learnt. The loader lists them: to extract indices
    from a mask on a device, the host would wait for their number."""
    labels_K: Tensor
    """The next token at each of them."""


class DrawnReferences:
    """A collator: of each sample some captions, drawn anew in each epoch."""

    def __init__(self, settings: CaptioningConfig) -> None:
        self.settings = settings
        self.vocabulary = open_vocabulary(settings)

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> References:
        drawn: list[tuple[int, list[int]]] = []
        for video, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
            for caption in self._drawn(sample, draw):
                drawn.append((video, self.vocabulary.encode(caption)[: self.settings.max_tokens]))
        longest = max((len(ids) for _, ids in drawn), default=0)
        count = max(1, len(drawn))  # a batch without captions has one line that nothing is learnt from
        ids = torch.full((count, longest + 1), self.vocabulary.padding)
        ids[:, 0] = self.vocabulary.start
        labels, learnt = [], []
        for line, (_, tokens) in enumerate(drawn):
            ids[line, 1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            labels += [*tokens, self.vocabulary.end]
            learnt += [line * (longest + 1) + position for position in range(len(tokens) + 1)]
        return References(
            ids,
            video_N=torch.tensor([video for video, _ in drawn] or [0]),
            learnt_K=torch.tensor(learnt or [0]),
            labels_K=torch.tensor(labels or [IGNORED]),
        )

    def _drawn(self, sample: Sample, draw: Draw) -> list[str]:
        """The pair's own caption first, then others at random."""
        count = min(self.settings.captions_per_video, len(sample.captions))
        order = random.Random(draw.seed).sample(range(len(sample.captions)), len(sample.captions))
        if draw.caption is not None:
            order = [draw.caption, *(index for index in order if index != draw.caption)]
        return [sample.captions[index] for index in order[:count]]
