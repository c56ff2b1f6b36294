"""How answers are scored: over all questions of a split, including those whose answer training did not have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from emcl.tasks.msrvtt_qa_questions import Questions
from emcl.tasks.msrvtt_qa_report import confusion, draw_confusion
from torch import Tensor

from emcl.errors import UserError
from emcl.metrics.answer_metrics import answer_metrics
from emcl.model.backbone import Encoded
from emcl.task import Record, Scorer, Scores

TOP = 5


class Answered(NamedTuple):
    """A question with the numbers of the best answers, best first, and of the right one."""

    question: str
    best: list[int]
    right: int


class AnswerScorer(Scorer):
    """Its records are questions; a video has any number of them."""

    def update(self, encoded: Encoded, inputs: Any | None, rows: Sequence[int]) -> None:
        questions: Questions | None = inputs
        device, asked = encoded.frames_BTD.device, None
        if questions is not None and questions.texts:
            asked = questions.ids_UL[questions.asked_N], questions.video_N
        filler = self.evaluation.backbone.tokenize([""]), torch.zeros(1, dtype=torch.long, device=device)

        def best(ids_NL: Tensor, video_N: Tensor) -> Tensor:
            logits_NV = self.task.answers_of(self.evaluation.backbone, encoded, ids_NL, video_N)
            return logits_NV.topk(min(TOP, logits_NV.shape[1])).indices

        best_NK = self.evaluation.lockstep(best, asked, filler).tolist()
        if questions is not None and asked is not None:
            answered = map(Answered, questions.texts, best_NK, questions.answer_N.tolist())
            self.records += zip((rows[video] for video in questions.video_N.tolist()), answered, strict=True)

    def compute(self, records: list[Record]) -> Scores:
        if not records:
            raise UserError("no video of this split has a question")
        answered: list[Answered] = [answer for _, answer in records]
        questions = [one.question for one in answered]
        top_QK, right_Q = np.array([one.best for one in answered]), np.array([one.right for one in answered])
        settings = self.task.settings
        given = "" if settings.use_video else "; WITHOUT THE VIDEO"
        if settings.answers_beyond:
            given += f"; vocabulary: those and {len(settings.answers_beyond)} more"
        names, counts = confusion(top_QK[:, 0], right_Q, settings.answers)
        return Scores(
            answer_metrics(top_QK, right_Q, questions, most_frequent=0),
            f"{len(records)} questions; one whose answer is not of the {len(settings.answers)} known counts as wrong"
            f"{given}",
            chosen="accuracy",
            items={
                "id": [self.evaluation.sample(row).id for row, _ in records],
                "question": questions,
                "answer": [settings.answers[number] if number >= 0 else None for number in right_Q.tolist()],
                "given": [settings.answers[number] for number in top_QK[:, 0].tolist()],
                "accuracy": (100.0 * (top_QK[:, 0] == right_Q)).tolist(),
            },
            picture=partial(draw_confusion, names, counts, self.evaluation.title),
        )
