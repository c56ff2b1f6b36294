"""The trained module: one backbone, and the active tasks' heads beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.loader import Collator
from emcl.data.text import TextSource
from emcl.distributed import ALONE, Ranks
from emcl.errors import UserError, said_of
from emcl.model.backbone import Backbone, Encoded
from emcl.registry import task_class
from emcl.task import Task

Part = str | Callable[[], Any]


class VideoLanguageModel(nn.Module):
    """Encodes a batch once and lets every task take its loss from that one encoding."""

    def __init__(self, config: Config, *, ranks: Ranks = ALONE, load_weights: bool = True) -> None:
        super().__init__()
        self.ranks = ranks
        self.backbone = Backbone(config.model, words=config.data.words, load_weights=load_weights)
        self.tasks = nn.ModuleDict()
        for name, kind in check_tasks(config).items():
            with said_of(f"tasks.{name}"):
                self.tasks[name] = kind(config.tasks[name], config, self.backbone)
        self.uncertainty = Uncertainty(list(config.tasks)) if config.uncertainty_weights else None

    @property
    def heads(self) -> dict[str, Task]:
        """The active tasks by name."""
        return cast("dict[str, Task]", dict(self.tasks.items()))

    def forward(self, batch: Mapping[str, Any] | None, part: Part = "losses") -> Any:
        """Name -> this rank's share of each loss; or, in evaluation, some part of the work.

        A share is scaled so that the mean over ranks, which DeepSpeed takes of gradients, is the loss of the
        global batch.

        Args:
            batch: of the loader.
            part: `losses`; `video` or `text` for embeddings; or a function, which is called within this forward pass,
                since ZeRO-3 keeps its books by those.
        """
        if callable(part):
            return part()
        assert batch is not None
        if part == "text":
            return self.backbone.encode_text(batch["text"])
        frames_BTD = self.backbone.encode_video(batch["frames"], batch["frame_slot"], batch["video_mask"])
        if part == "video":
            return frames_BTD
        encoded = Encoded(frames_BTD, batch["video_mask"])
        losses: dict[str, Tensor] = {}
        for name, task in self.heads.items():
            found = task.losses(self.backbone, encoded, batch["tasks"][name], self.ranks)
            if self.uncertainty is not None:
                found = self.uncertainty(name, found, self.ranks)
            for key, loss in found.items():
                losses[f"{name}/{key}"] = loss * self.ranks.world_size
        return losses


def check_tasks(config: Config) -> dict[str, type[Task]]:
    """The classes of a run's tasks by name.

    Raises:
        UserError: a name that PyTorch needs itself, such as `values`, or a task of an earlier version.
    """
    kinds = {name: task_class(config.kind_of(name)) for name in config.tasks}
    for name, kind in kinds.items():
        if hasattr(nn.ModuleDict(), name):
            way_out = f"kinds.OTHER={config.kind_of(name)} gives the task another"
            raise UserError(f"{name!r} is a word of PyTorch's own and no name for a task: {way_out}")
        if not hasattr(kind, "scorer_class"):
            raise UserError(f"{name}: {kind.__module__} was written for an earlier version: it has no scorer_class")
    return kinds


def collators(
    config: Config, texts: TextSource, *, training: bool, only: Sequence[str] | None = None
) -> dict[str, Collator]:
    """What makes each task's part of a batch (or that of the tasks of `only`)."""
    return {
        name: task_class(config.kind_of(name)).collator(settings, config, texts, training=training)
        for name, settings in config.tasks.items()
        if only is None or name in only
    }


class Uncertainty(nn.Module):
    """Learned weights of the tasks: exp(-s) loss + s (Kendall et al., CVPR 2018), s = log of the task's variance.

    A task without a sample in the global batch adds nothing, neither of its loss nor of s.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = list(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def forward(self, name: str, losses: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
        """This rank's shares, weighed, and its share of s as `log_variance`."""
        s = self.log_variance[self.names.index(name)].float()
        here = ranks.sum((total_loss(losses).detach() != 0).float()).clamp_max(1)
        weighed = {key: loss * torch.exp(-s) for key, loss in losses.items()}
        return {**weighed, "log_variance": s * here / ranks.world_size}


def total_loss(losses: Mapping[str, Tensor]) -> Tensor:
    """The sum of a forward pass's losses, ()."""
    return torch.stack(list(losses.values())).sum()
