"""A task of somebody else's that is asked something: does a sentence fit the video?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sentence_fit_settings import SentenceFitConfig
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.captions import DrawnCaptions, TextSource
from emcl.data.loader import Collator
from emcl.distributed import Ranks
from emcl.model.backbone import Backbone, Encoded
from emcl.model.pooling import mean_of_frames
from emcl.task import Offer, Prediction, Record, Scorer, Scores, Task


class FitScorer(Scorer):
    """Each video with its own caption, and with that of the video before it in the batch."""

    def update(self, encoded: Encoded, inputs: Any | None, rows: Sequence[int]) -> None:
        texts = inputs.text if inputs else self.evaluation.split.filler().to(self.evaluation.device)
        fits_2B = self.evaluation.run(lambda: self.task.pairs(self.evaluation.backbone, encoded, texts).sigmoid())
        self.records += zip(rows, (fits_2B.T > 0.5).tolist(), strict=False)

    def compute(self, records: list[Record]) -> Scores:
        right = [50.0 * (own + (not other)) for _, (own, other) in records]
        return Scores({"accuracy": sum(right) / len(right)}, f"{2 * len(right)} pairs", chosen="accuracy")


class SentenceFitTask(Task):
    config_class = SentenceFitConfig
    scorer_class = FitScorer
    offer = Offer("answer", "Does it fit?", "Whether a sentence fits the video.", "a red circle moves left")

    def __init__(self, settings: SentenceFitConfig, config: Config, backbone: Backbone) -> None:
        super().__init__(settings, config, backbone)
        self.weight = settings.weight
        self.scale = nn.Linear(1, 1)

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return DrawnCaptions(texts)

    def losses(self, backbone: Backbone, encoded: Encoded, inputs: Any, ranks: Ranks) -> dict[str, Tensor]:
        fits_2B = self.pairs(backbone, encoded, inputs.text)
        wanted_2B = torch.stack([torch.ones_like(fits_2B[0]), torch.zeros_like(fits_2B[0])])
        here_B = inputs.present_B.to(fits_2B.dtype)
        loss = (F.binary_cross_entropy_with_logits(fits_2B, wanted_2B, reduction="none") * here_B).sum()
        return {"cross_entropy": self.weight * loss / ranks.sum(here_B.sum()).clamp_min(1)}

    def pairs(self, backbone: Backbone, encoded: Encoded, text: Tensor) -> Tensor:
        """(2, B) logits: videos with their own texts, and with those of their neighbours."""
        text_BD = backbone.encode_text(text)
        return torch.stack([self.fits(encoded, text_BD), self.fits(encoded, text_BD.roll(1, 0))])

    def fits(self, encoded: Encoded, text_BD: Tensor) -> Tensor:
        video_BD = mean_of_frames(encoded.frames_BTD, encoded.video_mask_BT)
        return self.scale(F.cosine_similarity(video_BD, text_BD)[:, None])[:, 0]

    def predict(
        self, backbone: Backbone, encoded: Encoded, question: str | None = None, *, top: int = 1
    ) -> list[list[Prediction]]:
        asked = backbone.encode_text(backbone.tokenize([question or ""]))
        shares_B = self.fits(encoded, asked).float().sigmoid().tolist()
        each = [sorted([(share, "yes"), (1 - share, "no")], reverse=True)[:top] for share in shares_B]
        return [[Prediction(word, share) for share, word in likely] for likely in each]
