"""The trained module: one backbone, and the active tasks' heads beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from emcl.config import Config
from emcl.distributed import ALONE, Ranks
from emcl.model.backbone import Backbone, Encoded
from emcl.registry import task_class
from emcl.task import Task


class VideoLanguageModel(nn.Module):
    """Encodes a batch once and lets every task take its loss from that one encoding."""

    def __init__(self, config: Config, *, ranks: Ranks = ALONE, load_weights: bool = True) -> None:
        super().__init__()
        self.ranks = ranks
        self.backbone = Backbone(config.model, words=config.data.words, load_weights=load_weights)
        self.tasks = nn.ModuleDict(
            {name: task_class(name)(settings, config, self.backbone) for name, settings in config.tasks.items()}
        )

    @property
    def heads(self) -> dict[str, Task]:
        """The active tasks by name."""
        return cast("dict[str, Task]", dict(self.tasks.items()))

    def forward(self, batch: Mapping[str, Any], part: str = "losses") -> Any:
        """`losses`: name -> this rank's share of each loss. `video` / `text`: embeddings alone.

        A share is scaled so that the mean over ranks, which DeepSpeed takes of gradients, is the loss of the
        global batch.
        """
        if part == "text":
            return self.backbone.encode_text(batch["text"])
        frames_BTD = self.backbone.encode_video(batch["frames"], batch["frame_slot"], batch["video_mask"])
        if part == "video":
            return frames_BTD
        encoded = Encoded(frames_BTD, batch["video_mask"])
        losses: dict[str, Tensor] = {}
        for name, task in self.heads.items():
            for key, loss in task.losses(self.backbone, encoded, batch[name], self.ranks).items():
                losses[f"{name}/{key}"] = loss * self.ranks.world_size
        return losses


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()
