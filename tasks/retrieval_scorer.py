"""How retrieval is scored: all texts of a split with all its videos."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from emcl.tasks.retrieval_report import (
    DRAWN,
    FIRST,
    INDUCTIVE,
    TRANSDUCTIVE,
    WITHOUT_FACTORS,
    Found,
    draw_found,
)
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor

from emcl.data.captions import EveryCaption
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.evaluate.evaluate_settings import EvaluateConfig
from emcl.metrics.choice_recall import choice_recall
from emcl.metrics.rescoring import DualSoftmax, Rescoring, described, rescoring_of
from emcl.metrics.retrieval_metrics import protocol_metrics, retrieval_metrics
from emcl.model.backbone import Encoded
from emcl.model.embeddings import Embeddings
from emcl.model.pair_scores import add_ratios, described_factors, fingerprint_of, weight_of
from emcl.model.regulariser import Regulariser
from emcl.run_folder import EMBEDDINGS, SIMILARITY
from emcl.task import Evaluation, Scorer, Scores

LARGEST_KEPT = 2**25
"""Most scores of a similarity matrix that is saved for `emcl report`: 128 MiB."""
Rows = tuple[Sequence[int], tuple[Tensor, ...]]
"""Rows of the shards, and tensors with a row for each."""


class Compared(NamedTuple):
    """All texts with all videos; the scores are rank 0's."""

    scores_QG: NDArray[np.float32]
    embeddings: Embeddings
    video_rows: list[int]
    """Rows of the shards."""


class RetrievalScorer(Scorer):
    """Keeps whole batches instead of records: what is compared is in few large tensors."""

    def __init__(self, task: Any, evaluation: Evaluation) -> None:
        super().__init__(task, evaluation)
        self.videos: list[Rows] = []
        self.texts: list[Rows] = []

    def update(self, encoded: Encoded, inputs: Any | None, rows: Sequence[int]) -> None:
        captions: EveryCaption | None = inputs
        factors, text = self.evaluation.factors, captions.text if captions else None
        if factors is None:
            texts: Any = (self.evaluation.encode_text(text),)
        else:
            texts = self.evaluation.encode_text_with_outputs(text)
        if captions is None:
            return
        videos: Any = encoded.frames_BTD, encoded.video_mask_BT
        if factors is not None:
            videos = *videos, factors.video_vectors(encoded.outputs_BW)
        self.videos.append((rows, videos))
        if text is None:
            return
        if factors is not None:
            texts = texts[0], factors.text_vectors(texts[1].float())
        self.texts.append((captions.rows, texts))

    def embeddings(self) -> tuple[Embeddings, list[int]]:
        """All ranks' texts and videos on the CPU of every rank, and the videos' rows of the shards.

        Raises:
            UserError: no video has a text; on all ranks.
        """
        ranks, sample = self.evaluation.ranks, self.evaluation.sample
        text_rows, *texts = _in_row_order(ranks, self.texts)
        if not text_rows:
            raise UserError(f"{self.evaluation.name}: no video of this split has a caption")
        text_QD, *text_QE = texts
        video_rows, frames_GTD, mask_GT, *video_GE = _in_row_order(ranks, self.videos)
        column = {row: index for index, row in enumerate(video_rows)}
        sentences = [caption for row in video_rows for caption in sample(row).captions]
        owner_Q = np.array([column[row] for row in text_rows])
        ids = [sample(row).id for row in video_rows]
        kept = Embeddings(text_QD, frames_GTD, mask_GT, owner_Q, sentences, ids)
        if (factors := self.evaluation.factors) is not None:
            (text_factors,), (video_factors,) = text_QE, video_GE
            made_by = fingerprint_of(factors)
            kept = replace(kept, text_factors=text_factors, video_factors=video_factors, factors=made_by)
        return kept, video_rows

    def gather(self) -> Compared:
        """Compared by all ranks, evaluated on rank 0: a matrix of 100,000 x 10,000 has 4 GB."""
        evaluation, device = self.evaluation, self.task.logit_scale.device
        kept, video_rows = self.embeddings()
        scores_QG = self.task.similarity_in_tiles(
            kept.text.to(device), kept.frames.to(device), kept.mask.to(device),
            evaluation.config.evaluate.tile, evaluation.ranks, self.task.emcl,
        )  # fmt: skip
        return Compared(scores_QG, kept, video_rows)

    def factor_weight(self, weights: Sequence[float]) -> float:
        """That of the highest mean R@1 with one sentence a video, averaged over which; the smallest of equals."""
        scores_QG, kept, _ = self.gather()
        best = None
        if self.evaluation.ranks.first:
            recalls = {}
            for weight in sorted(weights):
                weighted_QG = scores_QG.copy()
                self._add_factors(weighted_QG, kept, weight)
                recalls[weight] = choice_recall(weighted_QG, kept.owner).mean
            best = max(recalls, key=recalls.__getitem__)
        return float(self.evaluation.ranks.from_first(best))

    def _add_factors(self, scores_QG: NDArray[np.float32], kept: Embeddings, weight: float) -> None:
        assert kept.text_factors is not None and kept.video_factors is not None
        if weight:
            scale = self.task.log_odds_scale / weight
            add_ratios(scores_QG, kept.text_factors, kept.video_factors, scale)

    def compute(self, records: Compared) -> Scores:
        (scores_QG, kept, video_rows), config = records, self.evaluation.config
        without = {}
        if (factors := self.evaluation.factors) is not None:
            kind = TRANSDUCTIVE if self.task.emcl is not None and self.task.emcl.transductive else INDUCTIVE
            without = {f"_{WITHOUT_FACTORS}_{kind}": retrieval_metrics(scores_QG, kept.owner)}
            self._add_factors(scores_QG, kept, weight_of(factors, self.evaluation.name))
        scored, ranked = protocol_metrics(scores_QG, kept.owner)
        results = {"": scored, **without}
        rescorings = _rescorings(config.evaluate)
        for name, rescoring in rescorings.items():
            suffix = f"_{name}_{TRANSDUCTIVE if rescoring.transductive else INDUCTIVE}"
            results[suffix] = retrieval_metrics(scores_QG, kept.owner, rescore=(rescoring, rescoring))
        metrics = {
            f"{direction}{suffix}/{name}": value
            for suffix, both in results.items()
            for direction, values in both.items()
            for name, value in values.items()
        }
        save: dict[str, Callable[[Path], None]] = {EMBEDDINGS: kept.save}
        if scores_QG.size <= LARGEST_KEPT:
            save[SIMILARITY] = partial(save_file, {"similarity": torch.from_numpy(scores_QG)})
        return Scores(
            metrics,
            self._protocol(len(kept.owner), len(video_rows), [described(*item) for item in rescorings.items()]),
            chosen="text_to_video/R@1",
            picture=partial(draw_found, _examples(records), self.evaluation.title),
            items={"video": kept.owner.tolist(), **{way: ranks_Q.tolist() for way, ranks_Q in ranked.items()}},
            save=save,
        )

    def _protocol(self, texts: int, videos: int, rescored: Sequence[str]) -> str:
        layer: Regulariser | None = self.task.emcl
        how = "no EMCL layer" if layer is None else layer.protocol(self.evaluation.config.evaluate.tile)
        if (factors := self.evaluation.factors) is not None:
            how += f"; {described_factors(factors, self.evaluation.name)}, and without them besides"
        return (
            f"{texts} texts x {videos} videos; a video's score for another video's texts is their best; ties count "
            f"against; {how}{'; rescored besides: ' if rescored else ''}{', '.join(rescored)}"
        )


def _rescorings(evaluate: EvaluateConfig) -> dict[str, Rescoring]:
    """By name, those that an evaluation reports besides; `evaluate.dsl` is short for the first."""
    chosen: dict[str, Rescoring] = {"dsl": DualSoftmax(evaluate.dsl_temperature)} if evaluate.dsl else {}
    if evaluate.rescoring != "none":
        chosen[evaluate.rescoring] = rescoring_of(evaluate.rescoring, evaluate.rescoring_options)
    return chosen


def _examples(compared: Compared) -> list[Found]:
    """Evenly chosen queries, each with the rows of its own video and of the first that were found."""
    scores_QG, kept, rows = compared
    chosen = np.linspace(0, len(kept.owner) - 1, min(DRAWN, len(kept.owner))).astype(int)
    return [
        Found(kept.sentences[query], rows[kept.owner[query]], [rows[g] for g in np.argsort(-scores_QG[query])[:FIRST]])
        for query in chosen
    ]


def _in_row_order(ranks: Ranks, batches: Sequence[Rows]) -> Any:
    """All ranks' rows and tensors, ordered by row: (rows, tensor, ...) on the CPU of every rank."""
    own_batches = [
        (rows, tuple(tensor.float().cpu() if tensor.is_floating_point() else tensor.cpu() for tensor in tensors))
        for rows, tensors in batches
    ]
    everyone = [item for batch in ranks.gather_objects(own_batches) for item in batch]
    rows = [row for batch_rows, _ in everyone for row in batch_rows]
    order = sorted(range(len(rows)), key=rows.__getitem__)  # stable: a video's captions keep their order
    columns = [torch.cat(blocks)[order] for blocks in zip(*(tensors for _, tensors in everyone), strict=True)]
    return [rows[index] for index in order], *columns
