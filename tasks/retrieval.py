"""Text-video retrieval: EMCL-Net's similarity, its contrastive loss, and recall in both directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from emcl.tasks.retrieval_report import RetrievalReport
from emcl.tasks.retrieval_scorer import RetrievalScorer
from emcl.tasks.task_settings import RetrievalConfig
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.captions import AllCaptions, Captions, DrawnCaptions, TextSource
from emcl.data.loader import Collator
from emcl.data.samples import Sample
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.backbone import Backbone, Encoded
from emcl.model.contrastive import clamp_logit_scale, contrastive_loss, of_own_slice, sigmoid_loss
from emcl.model.regulariser import Regulariser, regulariser_of
from emcl.model.similarity import similarity, similarity_on_ranks
from emcl.task import Task

LOGIT_BIAS = -10.0
"""SigLIP's at the start: of the pairs of a batch, nearly all are none."""


class RetrievalTask(Task):
    """Retrieval of videos by text and of texts by video."""

    config_class = RetrievalConfig
    scorer_class = RetrievalScorer
    report = RetrievalReport()

    def __init__(self, settings: RetrievalConfig, config: Config, backbone: Backbone) -> None:
        super().__init__(settings, config, backbone)
        self.settings = settings
        scale = backbone.initial_logit_scale if settings.logit_scale is None else math.log(settings.logit_scale)
        self.logit_scale = nn.Parameter(torch.tensor([scale]))
        self.logit_bias: nn.Parameter | None = None
        if settings.loss == "sigmoid":
            known = (settings.logit_bias, backbone.initial_logit_bias, LOGIT_BIAS)
            self.logit_bias = nn.Parameter(torch.tensor([float(next(bias for bias in known if bias is not None))]))
        self.emcl = regulariser_of(config, backbone.embed_dim)
        self.gather_with_grad = config.optim.gather_with_grad

    @classmethod
    def learn_settings(cls, settings: Any, config: Config, samples: Sequence[Sample]) -> Any:
        if not any(sample.captions for sample in samples):
            raise UserError(f"none of the {len(samples)} training samples has a caption")
        return settings

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return DrawnCaptions(texts) if training else AllCaptions(texts)

    def losses(self, backbone: Backbone, encoded: Encoded, inputs: Any, ranks: Ranks) -> dict[str, Tensor]:
        captions: Captions = inputs
        text_AD = backbone.encode_text(captions.text)
        mask_BT = encoded.video_mask_BT & captions.present_B[:, None]  # a video without a caption is not a negative
        video_B = encoded.videos_of_all_ranks(ranks)
        losses: dict[str, Tensor] = self(text_AD, encoded.frames_BTD, mask_BT, video_B, ranks)
        return {name: self.settings.weight * loss for name, loss in losses.items()}

    def forward(
        self, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, video_B: Tensor | None, ranks: Ranks
    ) -> dict[str, Tensor]:
        """The losses; a forward pass of this module, since ZeRO-3 gathers its own weights around those only.

        Args:
            video_B: of all ranks.
        """
        compared_AD, compared_BTD = text_AD, frames_BTD
        if not self.gather_with_grad:
            compared_AD, compared_BTD = of_own_slice(text_AD, ranks), of_own_slice(frames_BTD, ranks)
        everyone_BT = ranks.gather_rows(mask_BT)
        everything_BTD = ranks.gather_rows(compared_BTD)
        present_A = mask_BT.any(1)
        scores_AB = self.similarity(compared_AD, everything_BTD, everyone_BT, ranks, self.emcl, present_A)
        everyone_B = everyone_BT.any(1)
        if self.logit_bias is None:
            logits_AB = scores_AB * clamp_logit_scale(self.logit_scale.float()).exp()
            losses = {"contrastive": contrastive_loss(logits_AB, ranks, everyone_B, video_B)}
        else:  # SigLIP's scale has no bound, and those of its weights are above CLIP's
            logits_AB = scores_AB * self.logit_scale.float().exp() + self.logit_bias.float()
            losses = {"sigmoid": sigmoid_loss(logits_AB, ranks, everyone_B, video_B)}
        if self.emcl is not None:
            own = self.emcl.loss(text_AD * present_A[:, None], frames_BTD, mask_BT, ranks)
            losses |= {} if own is None else {"regulariser": own}
        return losses

    @property
    def log_odds_scale(self) -> float:
        """What a cosine is multiplied by to be log-odds: exp(logit_scale)."""
        scale = self.logit_scale.detach().float()
        return float((scale if self.logit_bias is not None else clamp_logit_scale(scale)).exp())

    def similarity(
        self,
        text_AD: Tensor,
        frames_BTD: Tensor,
        mask_BT: Tensor,
        ranks: Ranks,
        layer: Regulariser | None,
        present_A: Tensor | None = None,
    ) -> Tensor:
        """(A, D), (B, T, D), (B, T) -> (A, B), by this task's pooling and a regulariser, its own or another."""
        temperature = self.settings.pooling_temperature
        return similarity(
            text_AD, frames_BTD, mask_BT, temperature=temperature, regulariser=layer, ranks=ranks, present_A=present_A
        )

    def similarity_in_tiles(
        self, text_QD: Tensor, frames_GTD: Tensor, mask_GT: Tensor, tile: int, ranks: Ranks, layer: Regulariser | None
    ) -> np.ndarray:
        """(Q, G) on rank 0, as evaluations compare them (`emcl.task.Compares`)."""
        temperature = self.settings.pooling_temperature
        return similarity_on_ranks(
            text_QD, frames_GTD, mask_GT, tile, ranks, temperature=temperature, regulariser=layer
        )
