"""Open-ended video question answering as MSRVTT-QA defines it, with EMCL-Net's head and its contrastive term."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from emcl.tasks.settings import QAConfig
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.loader import Collator
from emcl.data.order import Draw
from emcl.data.samples import Sample
from emcl.data.text import TextSource
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.metrics.answers import answer_metrics
from emcl.model.answer_head import AnswerHead
from emcl.model.backbone import Backbone, Encoded
from emcl.model.contrastive import clamp_logit_scale, contrastive_loss
from emcl.model.emcl_layer import emcl_layer
from emcl.model.towers import tokenizer
from emcl.pictures import draw_confusion
from emcl.task import Evaluation, Scorer, Scores, Task

UNKNOWN = -1
"""The number of an answer that the vocabulary does not hold."""
TOP = 5
SHOWN = 12
"""Answers in the picture of confusions."""


class MsrvttQATask(Task):
    config_class = QAConfig
    learned = ("answers",)

    def __init__(self, settings: QAConfig, config: Config, backbone: Backbone) -> None:
        super().__init__(settings, config, backbone)
        if not settings.answers:
            raise UserError("tasks.msrvtt_qa.answers is not set: it is found from the questions of data.train")
        self.settings = settings
        widths = backbone.embed_dim, backbone.text.token_width
        self.head = AnswerHead(*widths, len(settings.answers), settings.dropout, settings.fusion)
        self.logit_scale = nn.Parameter(torch.tensor([backbone.initial_logit_scale]))
        self.emcl = emcl_layer(config, 4 * backbone.embed_dim) if settings.contrastive_weight else None

    @classmethod
    def learn_settings(cls, settings: Any, config: Config, samples: Sequence[Sample]) -> Any:
        if settings.answers:
            return settings
        counts = Counter(_answer(pair) for sample in samples for pair in sample.qa)
        if not counts:
            raise UserError(f"msrvtt_qa: none of the {len(samples)} training samples has a question")
        ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
        return dataclasses.replace(settings, answers=ordered[: settings.answers_kept])

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return _Questions(settings, config, training=training)

    def losses(self, backbone: Backbone, encoded: Encoded, part: Any, ranks: Ranks) -> dict[str, Tensor]:
        asked_ULW, asked_mask_UL = backbone.encode_tokens(part["ids"])
        video_BE, question_NE, logits_NV = self.head_of_all(
            encoded, asked_ULW, asked_mask_UL, part["place"], part["asked"]
        )
        known = part["answer"] != UNKNOWN
        loss = F.cross_entropy(logits_NV.float(), part["answer"], ignore_index=UNKNOWN, reduction="sum")
        weight = self.settings.weight
        losses = {"cross_entropy": weight * loss / ranks.sum(known.sum()).clamp_min(1)}
        if self.settings.contrastive_weight:
            contrastive = self(video_BE, question_NE[part["first"]], part["present"], ranks)
            losses["contrastive"] = weight * self.settings.contrastive_weight * contrastive
        return losses

    def head_of_all(
        self, encoded: Encoded, asked_ULW: Tensor, asked_mask_UL: Tensor, place_N: Tensor, asked_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected videos (B, E), projected questions (N, E), logits (N, V).

        Args:
            asked_ULW: different questions, token by token.
            place_N: each question's video in the batch.
            asked_N: its text among the U.
        """
        frames_BTD = encoded.frames_BTD if self.settings.use_video else torch.zeros_like(encoded.frames_BTD)
        video_BE = self.head.video(frames_BTD, encoded.video_mask_BT)
        question_NE = self.head.question(asked_ULW, asked_mask_UL)[asked_N]
        return video_BE, question_NE, self.head.answer(video_BE[place_N], question_NE)

    def forward(self, video_BE: Tensor, question_BE: Tensor, present_B: Tensor, ranks: Ranks) -> Tensor:
        """The contrastive term; a forward pass of this module, since ZeRO-3 gathers `logit_scale` around those only."""
        video_BE, question_BE = (rows * present_B[:, None] for rows in (video_BE, question_BE))
        if self.emcl is not None:
            video_BE, question_BE = self.emcl(video_BE, question_BE, all_reduce=ranks.sum)
        everyone_BE = ranks.gather_rows(F.normalize(video_BE.float(), dim=1))
        logits = F.normalize(question_BE.float(), dim=1) @ everyone_BE.T
        scale = clamp_logit_scale(self.logit_scale.float()).exp()
        return contrastive_loss(logits * scale, ranks, ranks.gather_rows(present_B))

    def scorer(self, config: Config) -> Scorer:
        return _AnswerScorer(self, config)


def _answer(pair: Mapping[str, str]) -> str:
    return pair["answer"].strip().lower()


@lru_cache(maxsize=2)
def _numbers(answers: tuple[str, ...]) -> dict[str, int]:
    return {answer: number for number, answer in enumerate(answers)}


class _Questions:
    """Different questions as token ids; of each asked one its text among them, its video's place, its answer's number.

    Of each video with questions, `first` names one line, for the contrastive term.
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
        answers = [self.numbers.get(_answer(pair), UNKNOWN) for _, pair in pairs] or [UNKNOWN]
        part: dict[str, Any] = {
            "ids": _tokenizer(self.name, self.words)(list(numbers)),  # many videos are asked the same
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


@lru_cache(maxsize=2)
def _tokenizer(name: str, words: int) -> Any:
    return tokenizer(name, words)


class _AnswerScorer(Scorer):
    def __init__(self, task: MsrvttQATask, config: Config) -> None:
        self.task, self.config = task, config
        self.found: list[tuple[list[int], int, str, int]] = []
        """Of each question: the best answers, the right one, its text, its video's row."""

    def add(self, encoded: Encoded, batch: Mapping[str, Any] | None, evaluation: Evaluation) -> None:
        part = batch["msrvtt_qa"] if batch else None
        count = len(part["questions"]) if part else 0
        rows = (part["ids"][part["asked"]][:count], part["place"][:count]) if part and count else None
        device = encoded.frames_BTD.device
        spare = _tokenizer(self.config.model.name, self.config.data.words)([""]).to(device)
        filler = spare, torch.zeros(1, dtype=torch.long, device=device)

        def top(ids_NL: Tensor, place_N: Tensor) -> Tensor:
            tokens_NLW, mask_NL = evaluation.backbone.encode_tokens(ids_NL)
            each_N = torch.arange(len(ids_NL), device=ids_NL.device)
            logits_NV = self.task.head_of_all(encoded, tokens_NLW, mask_NL, place_N, each_N)[2]
            return logits_NV.topk(min(TOP, logits_NV.shape[1])).indices

        best = evaluation.lockstep(top, rows, filler).tolist()
        if part and count:
            assert batch is not None
            videos = [batch["rows"][place] for place in part["place"][:count].tolist()]
            self.found += zip(best, part["answer"][:count].tolist(), part["questions"], videos, strict=True)

    def result(self, evaluation: Evaluation) -> Scores:
        found = [item for part in evaluation.ranks.gather_objects(self.found) for item in part]
        if not found:
            raise UserError("msrvtt_qa: no video of this split has a question")
        top, right = np.array([item[0] for item in found]), np.array([item[1] for item in found])
        answers = self.task.settings.answers or []
        metrics = answer_metrics(top, right, [item[2] for item in found], most_frequent=0)
        given = "" if self.task.settings.use_video else "; WITHOUT THE VIDEO"
        names, counts = _confusion(top[:, 0], right, answers)
        return Scores(
            metrics,
            f"{len(found)} questions; one whose answer is not of the {len(answers)} known counts as wrong{given}",
            chosen="accuracy",
            items={
                "id": [evaluation.source.shards.rows[item[3]].sample.id for item in found],
                "question": [item[2] for item in found],
                "answer": [answers[number] if number != UNKNOWN else None for number in right.tolist()],
                "given": [answers[number] for number in top[:, 0].tolist()],
                "accuracy": (100.0 * (top[:, 0] == right)).tolist(),
            },
            picture=partial(draw_confusion, names, counts, f"msrvtt_qa: {self.config.model.name}"),
        )


def _confusion(given_Q: np.ndarray, right_Q: np.ndarray, answers: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The most frequent right answers of this split: (lines, lines + 1), the last column any other answer."""
    asked = Counter(right_Q[right_Q != UNKNOWN].tolist())
    kept = [number for number, _ in asked.most_common(SHOWN)]
    columns = {number: place for place, number in enumerate(kept)}
    counts = np.zeros((len(kept), len(kept) + 1), int)
    for given, right in zip(given_Q.tolist(), right_Q.tolist(), strict=True):
        if right in columns:
            counts[columns[right], columns.get(given, len(kept))] += 1
    return [answers[number] for number in kept], counts
