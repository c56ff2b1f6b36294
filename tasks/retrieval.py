"""Text-video retrieval: EMCL-Net's similarity, its contrastive loss, and recall in both directions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emcl.tasks.settings import RetrievalConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.loader import Collator, every_caption, pick_caption
from emcl.data.order import Draw
from emcl.data.samples import Sample
from emcl.data.text import TextSource
from emcl.distributed import Ranks
from emcl.em import EMCL
from emcl.errors import UserError
from emcl.metrics.rescoring import DualSoftmax
from emcl.metrics.retrieval import protocol_metrics, retrieval_metrics
from emcl.model.backbone import Backbone, Encoded
from emcl.model.contrastive import clamp_logit_scale, contrastive_loss
from emcl.model.embeddings import Embeddings
from emcl.model.emcl_layer import emcl_layer
from emcl.model.similarity import similarity, similarity_by_tile
from emcl.pictures import Example, draw_retrieval
from emcl.run_folder import EMBEDDINGS, SIMILARITY
from emcl.task import Evaluation, Scorer, Scores, Task

EXAMPLES = 6
TOP = 5
LARGE_TILE = 512
LARGEST_KEPT = 2**25
"""Scores of a similarity that is kept for `emcl report`: 128 MiB."""


class RetrievalTask(Task):
    config_class = RetrievalConfig

    def __init__(self, settings: RetrievalConfig, config: Config, backbone: Backbone) -> None:
        super().__init__(settings, config, backbone)
        self.settings = settings
        scale = backbone.initial_logit_scale if settings.logit_scale is None else math.log(settings.logit_scale)
        self.logit_scale = nn.Parameter(torch.tensor([scale]))
        self.emcl = emcl_layer(config, backbone.embed_dim)

    @classmethod
    def learn_settings(cls, settings: Any, config: Config, samples: Sequence[Sample]) -> Any:
        if not any(sample.captions for sample in samples):
            raise UserError(f"retrieval: none of the {len(samples)} training samples has a caption")
        return settings

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return _DrawnCaptions(texts) if training else _AllCaptions(texts)

    def losses(self, backbone: Backbone, encoded: Encoded, part: Any, ranks: Ranks) -> dict[str, Tensor]:
        text_AD = backbone.encode_text(part["text"])
        mask_BT = encoded.video_mask_BT & part["present"][:, None]  # a video without a caption is nobody's negative
        return {"contrastive": self(text_AD, encoded.frames_BTD, mask_BT, ranks)}

    def forward(self, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, ranks: Ranks) -> Tensor:
        """The loss; a forward pass of this module, since ZeRO-3 gathers `logit_scale` around those only."""
        everyone_BT = ranks.gather_rows(mask_BT)
        everything_BTD = ranks.gather_rows(frames_BTD)
        scores_AB = self.similarity(text_AD, everything_BTD, everyone_BT, ranks, self.emcl, mask_BT.any(1))
        logits_AB = scores_AB * clamp_logit_scale(self.logit_scale.float()).exp()
        return self.settings.weight * contrastive_loss(logits_AB, ranks, everyone_BT.any(1))

    def similarity(
        self,
        text_AD: Tensor,
        frames_BTD: Tensor,
        mask_BT: Tensor,
        ranks: Ranks,
        layer: EMCL | None,
        present_A: Tensor | None = None,
    ) -> Tensor:
        """(A, D), (B, T, D), (B, T) -> (A, B), by this task's pooling and an EMCL layer, its own or another."""
        temperature = self.settings.pooling_temperature
        return similarity(
            text_AD, frames_BTD, mask_BT, temperature=temperature, emcl=layer, ranks=ranks, present_A=present_A
        )

    @torch.no_grad()
    def similarity_in_tiles(
        self, text_QD: Tensor, frames_GTD: Tensor, mask_GT: Tensor, tile: int, ranks: Ranks, layer: EMCL | None
    ) -> np.ndarray:
        """(Q, G) on rank 0 and (0, G) elsewhere, from tiles of texts x videos, whose rows the ranks share.

        The reference's EM sees one tile of `tile` x `tile` at a time, whichever rank computes it, and its scores depend
        on that; without it, or with compact bases, any tile gives the same scores, and large ones are taken.
        """
        if layer is None or layer.variant == "compact":
            tile = LARGE_TILE
        own: dict[int, np.ndarray] = {}
        for first in range(0, len(text_QD), tile)[ranks.rank :: ranks.world_size]:
            strip = similarity_by_tile(
                text_QD[first : first + tile], frames_GTD, mask_GT, tile,
                temperature=self.settings.pooling_temperature, emcl=layer,
            )  # fmt: skip
            own[first] = strip.float().cpu().numpy()  # the host waits once a strip
        everyone = ranks.collect_objects(own)
        if everyone is None:
            return np.empty((0, len(frames_GTD)), np.float32)
        scores_QG = np.empty((len(text_QD), len(frames_GTD)), np.float32)
        for strips in everyone:
            for first, rows in strips.items():
                scores_QG[first : first + tile] = rows
        return scores_QG

    def scorer(self, config: Config) -> Scorer:
        return _RetrievalScorer(self, config)


@dataclass
class _DrawnCaptions:
    """One caption a sample, and which samples have any."""

    texts: TextSource

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> dict[str, Any]:
        captions = [pick_caption(*pair) for pair in zip(samples, draws, strict=True)]
        present = torch.tensor([caption is not None for caption in captions])
        if not present.any():
            return {"text": self.texts.filler().expand(len(captions), -1), "present": present}
        spare = next(caption for caption in captions if caption is not None)
        return {"text": self.texts([caption or spare for caption in captions]), "present": present}


@dataclass
class _AllCaptions:
    """Every caption of each sample, with the sample's row."""

    texts: TextSource

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> dict[str, Any]:
        captions = [caption for pair in zip(samples, draws, strict=True) for caption in every_caption(*pair)]
        return {"text": self.texts(captions) if captions else None, "rows": [caption.row for caption in captions]}


class _RetrievalScorer(Scorer):
    def __init__(self, task: RetrievalTask, config: Config) -> None:
        self.task, self.config = task, config
        self.videos: list[tuple[list[int], Tensor, Tensor]] = []
        self.texts: list[tuple[list[int], Tensor]] = []

    def add(self, encoded: Encoded, batch: Mapping[str, Any] | None, evaluation: Evaluation) -> None:
        text = batch["retrieval"]["text"] if batch else None
        filler = evaluation.source.texts.filler().to(evaluation.device)
        embeddings = evaluation.lockstep(evaluation.backbone.encode_text, None if text is None else (text,), (filler,))
        if batch:
            self.videos.append((batch["rows"], encoded.frames_BTD, encoded.video_mask_BT))
        if batch and text is not None:
            self.texts.append((batch["retrieval"]["rows"], embeddings))

    def embeddings(self, evaluation: Evaluation) -> tuple[Embeddings, list[int]]:
        """All ranks' texts and videos on the CPU of every rank, and the videos' rows of the shards."""
        ranks, rows = evaluation.ranks, evaluation.source.shards.rows
        video_rows, frames, mask = _in_row_order(ranks, [(rows, (f, m)) for rows, f, m in self.videos])
        text_rows, text = _in_row_order(ranks, [(rows, (t,)) for rows, t in self.texts])
        column = {row: index for index, row in enumerate(video_rows)}
        sentences = [caption for row in video_rows for caption in rows[row].sample.captions]
        found = Embeddings(
            text, frames, mask, np.array([column[row] for row in text_rows]), sentences,
            [rows[row].sample.id for row in video_rows],
        )  # fmt: skip
        return found, video_rows

    def result(self, evaluation: Evaluation) -> Scores:
        """Of all ranks' scores, counted on rank 0: a matrix of 100,000 x 10,000 has 4 GB."""
        ranks = evaluation.ranks
        kept, video_rows = self.embeddings(evaluation)
        device = self.task.logit_scale.device
        scores_QG = self.task.similarity_in_tiles(
            kept.text.to(device), kept.frames.to(device), kept.mask.to(device), self.config.evaluate.tile, ranks,
            self.task.emcl,
        )  # fmt: skip
        scores = self._scores(scores_QG, kept, video_rows) if ranks.first else None
        metrics, protocol, chosen = ranks.from_first(
            (scores.metrics, scores.protocol, scores.chosen) if scores else None
        )
        return scores or Scores(metrics, protocol, chosen)

    def _scores(self, scores_QG: np.ndarray, kept: Embeddings, video_rows: list[int]) -> Scores:
        owner, settings = kept.owner, self.config.evaluate
        plain, ranked = protocol_metrics(scores_QG, owner)
        found = {"": plain}
        if settings.dsl:
            dsl = DualSoftmax(settings.dsl_temperature)
            found["_dsl_transductive"] = retrieval_metrics(scores_QG, owner, rescore=(dsl, dsl))
        metrics = {
            f"{direction}{suffix}/{name}": value
            for suffix, both in found.items()
            for direction, values in both.items()
            for name, value in values.items()
        }
        examples = [
            Example(
                kept.sentences[index],
                video_rows[owner[index]],
                [video_rows[i] for i in np.argsort(-scores_QG[index])[:TOP]],
            )
            for index in np.linspace(0, len(owner) - 1, min(EXAMPLES, len(owner))).astype(int)
        ]
        title = f"retrieval: {self.config.model.name}"
        save: dict[str, Callable[[Path], None]] = {EMBEDDINGS: kept.save}
        if scores_QG.size <= LARGEST_KEPT:
            save[SIMILARITY] = partial(save_file, {"similarity": torch.from_numpy(scores_QG)})
        return Scores(
            metrics,
            self._protocol(len(owner), len(video_rows)),
            chosen="text_to_video/R@1",
            picture=partial(draw_retrieval, examples, title),
            items={"video": owner.tolist(), **{way: ranks_Q.tolist() for way, ranks_Q in ranked.items()}},
            save=save,
        )

    def _protocol(self, texts: int, videos: int) -> str:
        emcl, settings = self.config.emcl, self.config.evaluate
        layers = {
            "reference": f"EMCL reference in tiles of {settings.tile} x {settings.tile}",
            "compact": "EMCL compact, bases of training",
        }
        layer = layers[emcl.variant] if emcl.enabled else "no EMCL"
        return (
            f"{texts} texts x {videos} videos; a video's score for another video's texts is their best; ties count "
            f"against; {layer}"
        )


def _in_row_order(ranks: Ranks, batches: Sequence[tuple[list[int], tuple[Tensor, ...]]]) -> Any:
    """All ranks' rows and tensors, ordered by row: (rows, tensor, ...) on the CPU of every rank."""
    mine = [
        (rows, tuple(tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu() for tensor in tensors))
        for rows, tensors in batches
    ]
    everyone = [item for part in ranks.gather_objects(mine) for item in part]
    rows = [row for part, _ in everyone for row in part]
    order = sorted(range(len(rows)), key=rows.__getitem__)  # stable: a video's captions keep their order
    columns = [torch.cat(parts)[order] for parts in zip(*(tensors for _, tensors in everyone), strict=True)]
    return [rows[index] for index in order], *columns
