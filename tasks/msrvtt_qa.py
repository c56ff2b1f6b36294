"""Open-ended video question answering as MSRVTT-QA defines it, with EMCL-Net's head and its contrastive term."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from emcl.tasks.msrvtt_qa_questions import UNKNOWN, AskedQuestions, Questions, answer_of
from emcl.tasks.msrvtt_qa_report import AnswersReport
from emcl.tasks.msrvtt_qa_scorer import AnswerScorer
from emcl.tasks.task_settings import QAConfig
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.captions import TextSource
from emcl.data.loader import Collator
from emcl.data.samples import Sample
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.answer_head import AnswerHead
from emcl.model.backbone import Backbone, Encoded
from emcl.model.contrastive import clamp_logit_scale, contrastive_loss, of_own_slice
from emcl.model.regulariser import regulariser_of
from emcl.task import Offer, Prediction, Task


class MsrvttQATask(Task):
    """A choice among the commonest answers, from a video and a question."""

    config_class = QAConfig
    scorer_class = AnswerScorer
    report = AnswersReport()
    offer = Offer("answer", "Ask", "The likeliest answers to a question about the video.", "what color is it?")
    learned = ("answers",)

    def __init__(self, settings: QAConfig, config: Config, backbone: Backbone) -> None:
        super().__init__(settings, config, backbone)
        if not settings.answers:
            raise UserError("answers is not set: it is found from the questions of data.train")
        self.settings = settings
        self.reference = settings.head == "reference"
        widths = backbone.embed_dim, backbone.embed_dim if self.reference else backbone.text.token_width
        self.head = AnswerHead(
            *widths, len(settings.answers), settings.dropout, settings.fusion, reference=self.reference
        )
        self.logit_scale = nn.Parameter(torch.tensor([backbone.initial_logit_scale]))
        self.emcl = regulariser_of(config, 4 * backbone.embed_dim) if settings.contrastive_weight else None
        self.gather_with_grad = config.optim.gather_with_grad

    @classmethod
    def learn_settings(cls, settings: Any, config: Config, samples: Sequence[Sample]) -> Any:
        if settings.answers and (settings.answers_beyond is not None or not settings.answers_counted):
            return settings
        counts = Counter(answer_of(pair) for sample in samples for pair in sample.qa)
        if not counts:
            raise UserError(f"none of the {len(samples)} training samples has a question")
        ordered = sorted(counts, key=lambda answer: (-counts[answer], answer))
        answers = settings.answers or ordered[: settings.answers_kept]
        beyond = None
        if settings.answers_counted:
            beyond = [answer for answer in ordered[: settings.answers_counted] if answer not in set(answers)]
        return dataclasses.replace(settings, answers=answers, answers_beyond=beyond)

    @classmethod
    def placeholder_settings(cls, settings: Any, config: Config) -> Any:
        return dataclasses.replace(settings, answers=settings.answers or [str(n) for n in range(settings.answers_kept)])

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return AskedQuestions(settings, config, training=training)

    def losses(self, backbone: Backbone, encoded: Encoded, inputs: Any, ranks: Ranks) -> dict[str, Tensor]:
        questions: Questions = inputs
        asked_ULW, asked_mask_UL = self.tokens(backbone, questions.ids_UL)
        video_BE, question_NE, logits_NV = self.head_of_all(
            encoded, asked_ULW, asked_mask_UL, questions.video_N, questions.asked_N
        )
        answer_N = questions.answer_N.clamp_min(UNKNOWN)
        known_N = answer_N != UNKNOWN
        loss = F.cross_entropy(logits_NV.float(), answer_N, ignore_index=UNKNOWN, reduction="sum")
        weight = self.settings.weight
        losses = {"cross_entropy": weight * loss / ranks.sum(known_N.sum()).clamp_min(1)}
        if self.settings.contrastive_weight:
            question_BE = question_NE[questions.first_B]
            compared = self(video_BE, question_BE, questions.present_B, encoded.videos_of_all_ranks(ranks), ranks)
            losses |= {name: weight * self.settings.contrastive_weight * term for name, term in compared.items()}
        return losses

    def tokens(self, backbone: Backbone, ids_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Questions token by token (N, L, W), and the token mask (N, L)."""
        if self.reference:  # padding counts there: all questions get as much, however long their neighbours are
            missing = max(0, backbone.max_tokens - ids_NL.shape[1])
            ids_NL = F.pad(ids_NL, (0, missing), value=backbone.text.padding)
        return backbone.encode_tokens(ids_NL, projected=self.reference)

    def head_of_all(
        self, encoded: Encoded, asked_ULW: Tensor, asked_mask_UL: Tensor, place_N: Tensor, asked_N: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projected videos (B, E), projected questions (N, E), logits (N, V).

        Args:
            asked_ULW: different questions, token by token.
            place_N: index of each question's video in the batch.
            asked_N: index of its text among the U.
        """
        frames_BTD = encoded.frames_BTD if self.settings.use_video else torch.zeros_like(encoded.frames_BTD)
        video_BE = self.head.video(frames_BTD, encoded.video_mask_BT)
        question_NE = self.head.question(asked_ULW, asked_mask_UL)[asked_N]
        return video_BE, question_NE, self.head.answer(video_BE[place_N], question_NE)

    def forward(
        self, video_BE: Tensor, question_BE: Tensor, present_B: Tensor, video_B: Tensor | None, ranks: Ranks
    ) -> dict[str, Tensor]:
        """The contrastive terms; a forward pass of this module, as ZeRO-3 gathers `logit_scale` around those only.

        Args:
            video_B: which video each row is of, for all ranks.
        """
        video_BE, question_BE = (rows * present_B[:, None] for rows in (video_BE, question_BE))
        own = None
        if self.emcl is not None:
            moved = self.emcl(video_BE, question_BE, all_reduce=ranks.sum)
            own = self.emcl.loss(question_BE, video_BE[:, None], present_B[:, None], ranks)
            video_BE, question_BE = moved
        if not self.gather_with_grad:
            video_BE, question_BE = of_own_slice(video_BE, ranks), of_own_slice(question_BE, ranks)
        everyone_BE = ranks.gather_rows(F.normalize(video_BE.float(), dim=1))
        logits = F.normalize(question_BE.float(), dim=1) @ everyone_BE.T
        scale = clamp_logit_scale(self.logit_scale.float()).exp()
        losses = {"contrastive": contrastive_loss(logits * scale, ranks, ranks.gather_rows(present_B), video_B)}
        return losses if own is None else {**losses, "regulariser": own}

    def answers_of(self, backbone: Backbone, encoded: Encoded, ids_NL: Tensor, place_N: Tensor) -> Tensor:
        """Logits (N, V) of questions, each about the video with its index `place_N`."""
        tokens_NLW, mask_NL = self.tokens(backbone, ids_NL)
        each_N = torch.arange(len(ids_NL), device=ids_NL.device)
        return self.head_of_all(encoded, tokens_NLW, mask_NL, place_N, each_N)[2]

    def predict(
        self, backbone: Backbone, encoded: Encoded, question: str | None = None, *, top: int = 1
    ) -> list[list[Prediction]]:
        """The likeliest answers to a question, with their probabilities."""
        videos, device = len(encoded.frames_BTD), encoded.frames_BTD.device
        asked = self.tokens(backbone, backbone.tokenize([question or ""]))
        every_B = torch.arange(videos, device=device)
        logits_NV = self.head_of_all(encoded, *asked, every_B, torch.zeros_like(every_B))[2]
        best = logits_NV.float().softmax(1).topk(min(top, logits_NV.shape[1]))
        return [
            [Prediction(self.settings.answers[number], share) for number, share in zip(*both, strict=True)]
            for both in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
