"""Questions as the head's input, and those that a training step draws."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from emcl.tasks.task_settings import QAConfig
from torch import Tensor

from emcl.config import Config
from emcl.data.sampler import Draw
from emcl.data.samples import QAPair, Sample
from emcl.model.backbone import tokenizer_of

UNKNOWN = -1
"""The index of an answer that is not in the vocabulary."""
BEYOND = -2
"""That of one which is, but no choice."""


def answer_of(pair: QAPair) -> str:
    """A pair's answer as the vocabulary has it."""
    return pair["answer"].strip().lower()


@lru_cache(maxsize=4)
def _numbers(answers: tuple[str, ...], beyond: tuple[str, ...]) -> dict[str, int]:
    return {**dict.fromkeys(beyond, BEYOND), **{answer: number for number, answer in enumerate(answers)}}


@dataclass
class Questions:
    """N questions of a batch's B videos, of which U are different."""

    ids_UL: Tensor
    """Token ids; many videos are asked the same."""
    asked_N: Tensor
    """The index of each question's text among the U."""
    video_N: Tensor
    """Its video, as its index in the batch."""
    answer_N: Tensor
    """Its answer's index, or UNKNOWN, or BEYOND."""
    first_B: Tensor
    """For each video the index of one of its questions among the N; 0 if it has none (`present_B`)."""
    present_B: Tensor
    """Which videos have any."""
    texts: list[str]
    """The N questions as they were asked; empty if there are none, when the tensors hold one filler."""


class AskedQuestions:
    """A collator: in training the draw's question, or a few of each video, drawn anew; in evaluations all."""

    def __init__(self, settings: QAConfig, config: Config, *, training: bool) -> None:
        self.settings, self.training = settings, training
        self.tokenize = tokenizer_of(config)
        self.numbers = _numbers(tuple(settings.answers or ()), tuple(settings.answers_beyond or ()))

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> Questions:
        pairs: list[tuple[int, QAPair]] = []
        first, present = torch.zeros(len(samples), dtype=torch.long), torch.zeros(len(samples), dtype=torch.bool)
        for video, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
            first[video], present[video] = len(pairs) if sample.qa else 0, bool(sample.qa)
            pairs += [(video, pair) for pair in self._drawn(sample, draw)]
        texts = [pair["question"] for _, pair in pairs] or [""]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        answers = [self.numbers.get(answer_of(pair), UNKNOWN) for _, pair in pairs] or [UNKNOWN]
        return Questions(
            ids_UL=self.tokenize(list(numbers)),
            asked_N=torch.tensor([numbers[text] for text in texts]),
            video_N=torch.tensor([video for video, _ in pairs] or [0]),
            answer_N=torch.tensor(answers),
            first_B=first,
            present_B=present,
            texts=texts if pairs else [],
        )

    def _drawn(self, sample: Sample, draw: Draw) -> list[QAPair]:
        if not self.training:
            return sample.qa
        if draw.question is not None:
            return [sample.qa[draw.question]]
        return random.Random(draw.seed).sample(sample.qa, min(self.settings.questions_per_video, len(sample.qa)))
