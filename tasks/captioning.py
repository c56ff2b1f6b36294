"""Video captioning: a transformers decoder over the EMCL-compacted frames, scored by pycocoevalcap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from emcl.tasks.captioning_report import CaptioningReport
from emcl.tasks.captioning_scorer import CaptionScorer
from emcl.tasks.captioning_tokens import IGNORED, DrawnReferences, References, open_vocabulary
from emcl.tasks.task_settings import HEAD, CaptioningConfig
from torch import Tensor

from emcl.config import Config
from emcl.data.captions import TextSource
from emcl.data.loader import Collator
from emcl.data.sampler import Draw
from emcl.data.samples import Sample
from emcl.data.vocabulary import UsedTokens
from emcl.distributed import ALONE, Ranks
from emcl.errors import UserError
from emcl.metrics.java import find_java
from emcl.model.backbone import Backbone, Encoded
from emcl.model.caption_decoder import CaptionDecoder
from emcl.model.emcl_layer import EMCLLayer
from emcl.model.model_settings import Generation
from emcl.task import Offer, Prediction, Task

LIKELY_TOKENS = 10_000
"""Number of different tokens in a large data set's captions, for a vocabulary that is not known yet."""


class CaptioningTask(Task):
    """A decoder that attends to a video's frames."""

    config_class = CaptioningConfig
    scorer_class = CaptionScorer
    report = CaptioningReport()
    offer = Offer("caption", "Describe it", "A sentence about the video.")
    learned = ("vocabulary",)

    def __init__(self, settings: CaptioningConfig, config: Config, backbone: Backbone) -> None:
        super().__init__(settings, config, backbone)
        self.settings = settings
        self.vocabulary = open_vocabulary(settings)
        width = settings.width or backbone.embed_dim
        self.decoder = CaptionDecoder(
            backbone.embed_dim,
            size=self.vocabulary.size,
            width=width,
            layers=settings.layers,
            heads=max(1, width // HEAD),
            positions=settings.max_tokens + 1,
            dropout=settings.dropout,
            ends=(self.vocabulary.padding, self.vocabulary.start, self.vocabulary.end),
            pretrained=settings.pretrained,
        )
        self.emcl: EMCLLayer | None = None
        if settings.emcl and config.emcl.enabled:
            self.emcl = EMCLLayer.create(
                config,
                backbone.embed_dim,
                bases=min(config.emcl.bases, backbone.embed_dim),
                beta=settings.emcl_beta,
                iterations=1,  # each step continues from the bases of the one before
                variant="compact",
            )

    @classmethod
    def learn_settings(cls, settings: Any, config: Config, samples: Sequence[Sample]) -> Any:
        if settings.pretrained is not None or settings.vocabulary is not None:
            return settings
        captions = [caption for sample in samples for caption in sample.captions]
        if not captions:
            raise UserError(f"none of the {len(samples)} training samples has a caption")
        return dataclasses.replace(settings, vocabulary=UsedTokens.of_captions(settings.tokenizer, captions))

    @classmethod
    def placeholder_settings(cls, settings: Any, config: Config) -> Any:
        if settings.pretrained is not None or settings.vocabulary is not None:
            return settings
        return dataclasses.replace(settings, vocabulary=UsedTokens.of_first(LIKELY_TOKENS))

    @classmethod
    def notices(cls) -> list[str]:
        java = find_java()
        if not isinstance(java, str):
            return []
        return [f"captions will be scored without METEOR, the others by a plain tokenizer: {java}"]

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return DrawnReferences(settings) if training else _nothing

    def losses(self, backbone: Backbone, encoded: Encoded, inputs: Any, ranks: Ranks) -> dict[str, Tensor]:
        references: References = inputs
        frames_NTD = self.compacted(encoded, ranks)[references.video_N]
        mask_NT, labels_K = encoded.video_mask_BT[references.video_N], references.labels_K
        logits_KV = self.decoder(references.ids_NL, frames_NTD, mask_NT, references.learnt_K)
        loss = F.cross_entropy(
            logits_KV.float(),
            labels_K,
            ignore_index=IGNORED,
            label_smoothing=self.settings.label_smoothing,
            reduction="sum",
        )
        tokens = ranks.sum((labels_K != IGNORED).sum()).clamp_min(1)
        return {"cross_entropy": self.settings.weight * loss / tokens}

    def compacted(self, encoded: Encoded, ranks: Ranks) -> Tensor:
        """(B, T, D) with EMCL's correction, whose bases are fitted to the frames of all ranks."""
        frames_BTD = encoded.frames_BTD
        if self.emcl is None:
            return frames_BTD
        present = frames_BTD * encoded.video_mask_BT[..., None]  # rows of zeros do not count
        (corrected,) = self.emcl(present, all_reduce=ranks.sum)
        return corrected

    @torch.no_grad()
    def generate(self, encoded: Encoded, how: Generation | None = None) -> list[str]:
        """One caption a video; the layer must be in evaluation mode."""
        partitioned = any(hasattr(parameter, "ds_id") for parameter in self.parameters())
        ids = self.decoder.generate(
            self.compacted(encoded, ALONE),
            encoded.video_mask_BT,
            how or self.settings.generation,
            in_step=partitioned,
        )
        return [self.vocabulary.decode(row) for row in ids.tolist()]

    def predict(
        self, backbone: Backbone, encoded: Encoded, question: str | None = None, *, top: int = 1
    ) -> list[list[Prediction]]:
        """One a video, by the settings of `generation`."""
        return [[Prediction(caption)] for caption in self.generate(encoded)]


def _nothing(samples: Sequence[Sample], draws: Sequence[Draw]) -> dict[str, Any]:
    return {}
