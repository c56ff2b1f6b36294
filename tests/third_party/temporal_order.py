"""A task of somebody else's: do these frames run forwards or backwards?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from other_settings import TemporalOrderConfig
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.captions import TextSource
from emcl.data.loader import Collator
from emcl.distributed import Ranks
from emcl.model.backbone import Backbone, Encoded
from emcl.task import Case, Offer, Prediction, Record, Result, Scorer, Scores, Shown, Task, TaskReport
from emcl.task.task_report import PictureOf, best_and_worst

WORDS = ("forwards", "backwards")


class OrderScorer(Scorer):
    """Every other video is turned; a record is whether it was, and how likely that seems."""

    def update(self, encoded: Encoded, inputs: Any | None, rows: Sequence[int]) -> None:
        turned_B = torch.tensor([row % 2 for row in rows] or [0], device=encoded.frames_BTD.device)
        share_B2 = self.evaluation.run(lambda: self.task.logits(encoded, turned_B).softmax(1))
        self.records += zip(rows, zip(turned_B.tolist(), share_B2.tolist(), strict=True), strict=False)

    def compute(self, records: list[Record]) -> Scores:
        right = [100.0 * (shares[turned] > 0.5) for _, (turned, shares) in records]
        return Scores(
            {"accuracy": sum(right) / len(right)},
            f"{len(right)} videos, every other one turned",
            chosen="accuracy",
            files={"turned-{split}.txt": "\n".join(WORDS[turned] for _, (turned, _) in records)},
            items={
                "id": [self.evaluation.sample(row).id for row, _ in records],
                "accuracy": right,
                "order": [WORDS[turned] for _, (turned, _) in records],
                "certainty": [100 * shares[turned] for _, (turned, shares) in records],
            },
        )


class OrderReport(TaskReport):
    columns = ("accuracy",)

    def cases(self, result: Result, picture: PictureOf) -> dict[str, list[Case]]:
        items = result.items

        def case(index: int) -> Case:
            outcome = f"found so by {items['certainty'][index]:.0f}%"
            return Case(f"shown {items['order'][index]}", outcome, [Shown.of(items["id"][index], picture)])

        return best_and_worst(items["certainty"], case) if items else {}


class TemporalOrderTask(Task):
    config_class = TemporalOrderConfig
    scorer_class = OrderScorer
    report = OrderReport()
    offer = Offer("order", "Which way?", "Whether the frames run forwards or backwards.")

    def __init__(self, settings: TemporalOrderConfig, config: Config, backbone: Backbone) -> None:
        super().__init__(settings, config, backbone)
        self.weight = settings.weight
        self.recurrent = nn.GRU(backbone.embed_dim, settings.hidden, batch_first=True)
        self.classifier = nn.Linear(settings.hidden, 2)

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return _coins

    def losses(self, backbone: Backbone, encoded: Encoded, inputs: Any, ranks: Ranks) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.logits(encoded, inputs["backwards"]), inputs["backwards"], reduction="sum")
        count = ranks.sum(torch.tensor(len(inputs["backwards"]), device=loss.device))
        return {"cross_entropy": self.weight * loss / count}

    def logits(self, encoded: Encoded, backwards_B: Tensor) -> Tensor:
        """(B, 2) of the videos as they are, or turned."""
        frames_BTD = encoded.frames_BTD
        turned = torch.where(backwards_B[:, None, None] == 1, frames_BTD.flip(1), frames_BTD)
        _, last = self.recurrent(turned)
        return self.classifier(last[0])

    def predict(
        self, backbone: Backbone, encoded: Encoded, question: str | None = None, *, top: int = 1
    ) -> list[list[Prediction]]:
        as_they_are = torch.zeros(len(encoded.frames_BTD), dtype=torch.long, device=encoded.frames_BTD.device)
        shares_B2 = self.logits(encoded, as_they_are).float().softmax(1).tolist()
        each = [sorted(zip(shares, WORDS, strict=True), reverse=True)[:top] for shares in shares_B2]
        return [[Prediction(word, share) for share, word in likely] for likely in each]


def _coins(samples: Sequence[Any], draws: Sequence[Any]) -> dict[str, Tensor]:
    return {"backwards": torch.tensor([draw.seed % 2 for draw in draws])}
