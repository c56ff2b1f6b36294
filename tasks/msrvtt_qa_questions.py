"""Questions as the head's input, and what a training step draws of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from emcl.tasks.settings import QAConfig

from emcl.config import Config
from emcl.data.order import Draw
from emcl.data.samples import Sample
from emcl.model.towers import tokenizer

UNKNOWN = -1
"""The number of an answer that the vocabulary does not hold."""


def answer_of(pair: Mapping[str, str]) -> str:
    """A pair's answer as the vocabulary has it."""
    return pair["answer"].strip().lower()


@lru_cache(maxsize=2)
def question_tokenizer(name: str, words: int) -> Any:
    """Of a text tower; texts -> (n, words) token ids."""
    return tokenizer(name, words)


@lru_cache(maxsize=4)
def _numbers(answers: tuple[str, ...]) -> dict[str, int]:
    return {answer: number for number, answer in enumerate(answers)}


class AskedQuestions:
    """Different questions as token ids; of each asked one its text among them, its video's place, its answer's number.

    In training a few of each video, drawn anew; `first` then names one line of each video with questions, for the
    contrastive term. In evaluations all.
    """

    def __init__(self, settings: QAConfig, config: Config, *, training: bool) -> None:
        self.settings, self.training = settings, training
        self.name, self.words = config.model.name, config.data.words
        self.numbers = _numbers(tuple(settings.answers or ()))

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> dict[str, Any]:
        pairs: list[tuple[int, Mapping[str, str]]] = []
        first, present = torch.zeros(len(samples), dtype=torch.long), torch.zeros(len(samples), dtype=torch.bool)
        for place, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
            first[place], present[place] = len(pairs) if sample.qa else 0, bool(sample.qa)
            pairs += [(place, pair) for pair in self._drawn(sample, draw)]
        texts = [pair["question"] for _, pair in pairs] or [""]
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        answers = [self.numbers.get(answer_of(pair), UNKNOWN) for _, pair in pairs] or [UNKNOWN]
        part: dict[str, Any] = {
            "ids": question_tokenizer(self.name, self.words)(list(numbers)),  # many videos are asked the same
            "asked": torch.tensor([numbers[text] for text in texts]),
            "place": torch.tensor([place for place, _ in pairs] or [0]),
            "answer": torch.tensor(answers),
        }
        if self.training:
            return {**part, "first": first, "present": present}
        return {**part, "questions": texts if pairs else []}

    def _drawn(self, sample: Sample, draw: Draw) -> list[dict[str, str]]:
        if not self.training:
            return sample.qa
        return random.Random(draw.seed).sample(sample.qa, min(self.settings.questions_per_video, len(sample.qa)))
