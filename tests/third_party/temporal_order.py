"""A task of somebody else's: do these frames run forwards or backwards?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from temporal_order_settings import TemporalOrderConfig
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.loader import Collator
from emcl.data.text import TextSource
from emcl.distributed import Ranks
from emcl.model.backbone import Backbone, Encoded
from emcl.task import Evaluation, Scorer, Scores, Task


class TemporalOrderTask(Task):
    config_class = TemporalOrderConfig

    def __init__(self, settings: TemporalOrderConfig, config: Config, backbone: Backbone) -> None:
        super().__init__(settings, config, backbone)
        self.weight = settings.weight
        self.recurrent = nn.GRU(backbone.embed_dim, settings.hidden, batch_first=True)
        self.classifier = nn.Linear(settings.hidden, 2)

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        return _coins

    def losses(self, backbone: Backbone, encoded: Encoded, part: Any, ranks: Ranks) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.logits(encoded, part["backwards"]), part["backwards"], reduction="sum")
        count = ranks.sum(torch.tensor(len(part["backwards"]), device=loss.device))
        return {"cross_entropy": self.weight * loss / count}

    def logits(self, encoded: Encoded, backwards_B: Tensor) -> Tensor:
        frames_BTD = encoded.frames_BTD
        turned = torch.where(backwards_B[:, None, None] == 1, frames_BTD.flip(1), frames_BTD)
        _, last = self.recurrent(turned)
        return self.classifier(last[0])

    def scorer(self, config: Config) -> Scorer:
        return _OrderScorer(self)


def _coins(samples: Sequence[Any], draws: Sequence[Any]) -> dict[str, Tensor]:
    return {"backwards": torch.tensor([draw.seed % 2 for draw in draws])}


class _OrderScorer(Scorer):
    def __init__(self, task: TemporalOrderTask) -> None:
        self.task = task
        self.right: list[bool] = []

    def add(self, encoded: Encoded, batch: Mapping[str, Any] | None, evaluation: Evaluation) -> None:
        coins = torch.arange(len(encoded.frames_BTD), device=encoded.frames_BTD.device) % 2
        guess = evaluation.run(lambda: self.task.logits(encoded, coins).argmax(1))
        if batch is not None:
            self.right += (guess == coins).tolist()

    def result(self, evaluation: Evaluation) -> Scores:
        right = [item for part in evaluation.ranks.gather_objects(self.right) for item in part]
        return Scores(
            {"accuracy": 100 * sum(right) / len(right)}, f"{len(right)} videos, half turned", chosen="accuracy"
        )
