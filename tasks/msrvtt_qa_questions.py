"""Questions as the head's input, and what a training step draws of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from emcl.tasks.settings import QAConfig
from torch import Tensor

from emcl.config import Config
from emcl.data.order import Draw
from emcl.data.samples import QAPair, Sample
from emcl.model.backbone import tokenizer_of

UNKNOWN = -1
"""The number of an answer that the vocabulary does not hold."""


def answer_of(pair: QAPair) -> str:
    """A pair's answer as the vocabulary has it."""
    return pair["answer"].strip().lower()


@lru_cache(maxsize=4)
def _numbers(answers: tuple[str, ...]) -> dict[str, int]:
    return {answer: number for number, answer in enumerate(answers)}


@dataclass
class Questions:
    """N questions of a batch's B videos, of which U are different."""

    ids_UL: Tensor
    """Token ids; many videos are asked the same."""
    asked_N: Tensor
    """Each question's text among the U."""
    video_N: Tensor
    """Its video, as its place in the batch."""
    answer_N: Tensor
    """Its answer's number, or UNKNOWN."""
    first_B: Tensor
    """Of each video the number of one of its questions among the N; 0 where it has none (`present_B`)."""
    present_B: Tensor
    """Which videos have any."""
    texts: list[str]
    """The N, as they were asked; none where a single line stands for no question at all."""


class AskedQuestions:
    """A collator: in training a few questions of each video, drawn anew; in evaluations all."""

    def __init__(self, settings: QAConfig, config: Config, *, training: bool) -> None:
        self.settings, self.training = settings, training
        self.tokenize = tokenizer_of(config)
        self.numbers = _numbers(tuple(settings.answers or ()))

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> Questions:
        pairs: list[tuple[int, QAPair]] = []
        first, present = torch.zeros(len(samples), dtype=torch.long), torch.zeros(len(samples), dtype=torch.bool)
        for place, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
            first[place], present[place] = len(pairs) if sample.qa else 0, bool(sample.qa)
            pairs += [(place, pair) for pair in self._drawn(sample, draw)]
        texts = [pair["question"] for _, pair in pairs] or [""]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        answers = [self.numbers.get(answer_of(pair), UNKNOWN) for _, pair in pairs] or [UNKNOWN]
        return Questions(
            ids_UL=self.tokenize(list(numbers)),
            asked_N=torch.tensor([numbers[text] for text in texts]),
            video_N=torch.tensor([place for place, _ in pairs] or [0]),
            answer_N=torch.tensor(answers),
            first_B=first,
            present_B=present,
            texts=texts if pairs else [],
        )

    def _drawn(self, sample: Sample, draw: Draw) -> list[QAPair]:
        if not self.training:
            return sample.qa
        return random.Random(draw.seed).sample(sample.qa, min(self.settings.questions_per_video, len(sample.qa)))
