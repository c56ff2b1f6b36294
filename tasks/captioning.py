"""Video captioning: a transformers decoder over the EMCL-compacted frames, scored by pycocoevalcap."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from emcl.tasks.settings import HEAD, CaptioningConfig
from torch import Tensor

from emcl.config import Config
from emcl.data.loader import Collator
from emcl.data.order import Draw
from emcl.data.samples import Sample
from emcl.data.text import TextSource
from emcl.data.vocabulary import UsedTokens, Vocabulary, WholeVocabulary
from emcl.distributed import Ranks
from emcl.em import EMCL
from emcl.errors import UserError
from emcl.metrics.captions import COUNTS, caption_metrics
from emcl.metrics.java import find_java
from emcl.model.backbone import Backbone, Encoded
from emcl.model.caption_decoder import CaptionDecoder
from emcl.model.emcl_layer import emcl_layer
from emcl.model.settings import Generation
from emcl.pictures import Captioned, draw_captions
from emcl.task import Evaluation, Scorer, Scores, Task

EXAMPLES = 6
IGNORED = -100
"""A label that the cross-entropy leaves out."""


def open_vocabulary(settings: CaptioningConfig) -> Vocabulary:
    if settings.pretrained is not None:
        return WholeVocabulary(settings.tokenizer or settings.pretrained)
    if settings.vocabulary is None:
        raise UserError("tasks.captioning.vocabulary is not set: it is found from the captions of data.train")
    return UsedTokens.open(settings.tokenizer, settings.vocabulary)


class CaptioningTask(Task):
    config_class = CaptioningConfig
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
            positions=settings.words + 1,
            dropout=settings.dropout,
            ends=(self.vocabulary.padding, self.vocabulary.start, self.vocabulary.end),
            pretrained=settings.pretrained,
        )
        self.emcl: EMCL | None = None
        if settings.emcl:
            self.emcl = emcl_layer(
                config,
                backbone.embed_dim,
                bases=min(config.emcl.k, backbone.embed_dim),
                beta=settings.emcl_beta,
                iterations=1,  # each step goes on from the bases of the one before
                variant="compact",
            )

    @classmethod
    def learn_settings(cls, settings: Any, config: Config, samples: Sequence[Sample]) -> Any:
        if settings.pretrained is not None or settings.vocabulary is not None:
            return settings
        captions = [caption for sample in samples for caption in sample.captions]
        if not captions:
            raise UserError(f"captioning: none of the {len(samples)} training samples has a caption")
        return dataclasses.replace(settings, vocabulary=UsedTokens.of_captions(settings.tokenizer, captions))

    @classmethod
    def notices(cls) -> list[str]:
        java = find_java()
        if not isinstance(java, str):
            return []
        return [f"captions will be scored without METEOR, the others by a plain tokenizer: {java}"]

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return _References(settings) if training else _nothing

    def losses(self, backbone: Backbone, encoded: Encoded, part: Any, ranks: Ranks) -> dict[str, Tensor]:
        frames_BTD = self.compacted(encoded, ranks)
        place_N, labels_K = part["place"], part["labels"]
        logits_KV = self.decoder(part["ids"], frames_BTD[place_N], encoded.video_mask_BT[place_N], part["tokens"])
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
            self.compacted(encoded, Ranks()),
            encoded.video_mask_BT,
            how or self.settings.generation,
            in_step=partitioned,
        )
        return [self.vocabulary.decode(row) for row in ids.tolist()]

    def scorer(self, config: Config) -> Scorer:
        return _CaptionScorer(self, config)


def _nothing(samples: Sequence[Sample], draws: Sequence[Draw]) -> dict[str, Any]:
    return {}


class _References:
    """Drawn captions as token ids; of each its video's `place` in the batch; `tokens`, where in the flattened ids what
    comes next is learnt, and `labels`, what it is."""

    def __init__(self, settings: CaptioningConfig) -> None:
        self.settings = settings
        self.vocabulary = open_vocabulary(settings)

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw]) -> dict[str, Any]:
        found: list[tuple[int, list[int]]] = []
        for place, (sample, draw) in enumerate(zip(samples, draws, strict=True)):
            for caption in self._drawn(sample, draw):
                found.append((place, self.vocabulary.encode(caption)[: self.settings.words]))
        longest = max((len(ids) for _, ids in found), default=0)
        count = max(1, len(found))  # a batch without captions has one line that nothing is learnt from
        ids = torch.full((count, longest + 1), self.vocabulary.padding)
        ids[:, 0] = self.vocabulary.start
        labels, places = [], []
        for line, (_, tokens) in enumerate(found):
            ids[line, 1 : 1 + len(tokens)] = torch.tensor(tokens, dtype=torch.long)
            labels += [*tokens, self.vocabulary.end]
            places += [line * (longest + 1) + place for place in range(len(tokens) + 1)]
        return {
            "ids": ids,
            "place": torch.tensor([place for place, _ in found] or [0]),
            "tokens": torch.tensor(places or [0]),  # found here, as a mask on the device would stop its step
            "labels": torch.tensor(labels or [IGNORED]),
        }

    def _drawn(self, sample: Sample, draw: Draw) -> list[str]:
        """The pair's own caption first, then others at random."""
        count = min(self.settings.captions_per_video, len(sample.captions))
        order = random.Random(draw.seed).sample(range(len(sample.captions)), len(sample.captions))
        if draw.caption is not None:
            order = [draw.caption, *(index for index in order if index != draw.caption)]
        return [sample.captions[index] for index in order[:count]]


class _CaptionScorer(Scorer):
    def __init__(self, task: CaptioningTask, config: Config) -> None:
        self.task, self.config = task, config
        self.captions: list[tuple[int, str]] = []

    def add(self, encoded: Encoded, batch: Mapping[str, Any] | None, evaluation: Evaluation) -> None:
        captions = evaluation.run(partial(self.task.generate, encoded))
        if batch is not None:
            self.captions += zip(batch["rows"], captions, strict=True)

    def result(self, evaluation: Evaluation) -> Scores:
        """Scores all ranks' captions, each video once, on rank 0."""
        ranks, rows = evaluation.ranks, evaluation.source.shards.rows
        everyone = dict(item for part in ranks.gather_objects(self.captions) for item in part)
        scored = {row: text for row, text in sorted(everyone.items()) if rows[row].sample.captions}
        if not scored:
            raise UserError("captioning: no video of this split has a reference caption")
        found = None
        if ranks.first:
            found = caption_metrics(
                {str(row): text for row, text in scored.items()},
                {str(row): rows[row].sample.captions for row in scored},
            )
        found = ranks.gather_objects(found)[0]
        suffix = "" if found.tokenizer == "ptb" else f"_{found.tokenizer}_tokens"
        metrics = {f"{name}{suffix}": 100 * value for name, value in found.metrics.items()}
        predictions = [{"image_id": rows[row].sample.id, "caption": text} for row, text in sorted(everyone.items())]
        chosen = list(scored)[:: max(1, len(scored) // EXAMPLES)][:EXAMPLES]
        examples = [Captioned(row, scored[row], rows[row].sample.captions) for row in chosen]
        return Scores(
            metrics,
            self._protocol(len(scored), found.tokenizer, found.missing),
            chosen=f"CIDEr{suffix}",
            picture=partial(draw_captions, examples, f"captioning: {self.config.model.name}"),
            items={
                "id": [rows[row].sample.id for row in scored],
                "caption": list(scored.values()),
                "reference": [rows[row].sample.captions[0] for row in scored],
                COUNTS: found.counts,
                **{f"{name}{suffix}": [100 * value for value in values] for name, values in found.each.items()},
            },
            files={"captions-{split}.json": json.dumps(predictions, indent=0, ensure_ascii=False)},
        )

    def _protocol(self, videos: int, tokenizer: str, missing: str | None) -> str:
        how = self.task.settings.generation
        words = "sampled" if how.do_sample else "greedy" if how.num_beams == 1 else f"beam {how.num_beams}"
        tokens = {"ptb": "PTB tokenizer", "plain": "PLAIN TOKENIZER, not comparable with published scores"}[tokenizer]
        gone = f"; without {missing}" if missing else ""
        return f"{videos} videos, all references, scores x 100, {tokens}; {words}{gone}"
