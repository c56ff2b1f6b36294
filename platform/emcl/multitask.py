"""The trained module: one backbone, and the active tasks' heads beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.batch import Batch
from emcl.data.captions import TextSource
from emcl.data.loader import Collator
from emcl.distributed import ALONE, Ranks
from emcl.errors import UserError, said_of
from emcl.model.backbone import Encoded, build_backbone
from emcl.registry import task_class
from emcl.task import Task


class VideoLanguageModel(nn.Module):
    """Encodes a batch once and lets every task take its loss from that one encoding."""

    def __init__(self, config: Config, *, ranks: Ranks = ALONE, load_weights: bool = True) -> None:
        super().__init__()
        self.ranks = ranks
        self.same_video_negatives = config.optim.same_video_negatives
        self.backbone = build_backbone(config, load_weights=load_weights)
        self.tasks = nn.ModuleDict()
        for name, kind in check_tasks(config).items():
            with said_of(f"tasks.{name}"):
                self.tasks[name] = kind(config.tasks[name], config, self.backbone)
        self.uncertainty = Uncertainty(list(config.tasks)) if config.uncertainty_weights else None

    @property
    def heads(self) -> dict[str, Task]:
        """The active tasks by name."""
        return cast("dict[str, Task]", dict(self.tasks.items()))

    def forward(self, *, batch: Batch | None = None, call: Callable[[], Any] | None = None) -> Any:
        """The losses of a batch; or what `call` returns, for any other work.

        All work goes through here, since ZeRO-3 tracks weights by forward passes of the whole model.
        """
        if call is not None:
            return call()
        assert batch is not None
        return self.losses(batch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """This rank's share of each loss by name, `TASK/LOSS`.

        A share is scaled so that the mean over ranks, which DeepSpeed takes of gradients, is the loss of the
        global batch.
        """
        encoded = self.encode(batch)
        losses: dict[str, Tensor] = {}
        for name, task in self.heads.items():
            of_task = task.losses(self.backbone, encoded, batch.tasks[name], self.ranks)
            if self.uncertainty is not None:
                of_task = self.uncertainty(name, of_task, self.ranks)
            for key, loss in of_task.items():
                losses[f"{name}/{key}"] = loss * self.ranks.world_size
        return losses

    def encode(self, batch: Batch, *, with_outputs: bool = False) -> Encoded:
        """The batch's videos, once for all tasks; `with_outputs` also fills `Encoded.outputs_BW`."""
        assert batch.videos is not None
        video_B, mask_BT = None if self.same_video_negatives else batch.video_B, batch.videos.mask_BT
        if with_outputs:
            frames_BTD, outputs_BW = self.backbone.encode_video_with_outputs(batch.videos)
            return Encoded(frames_BTD, mask_BT, video_B, outputs_BW)
        return Encoded(self.backbone.encode_video(batch.videos), mask_BT, video_B)


def check_tasks(config: Config) -> dict[str, type[Task]]:
    """The classes of a run's tasks by name.

    Raises:
        UserError: a name that PyTorch reserves, such as `values`, or a task of an earlier version.
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
    """The collators that make each task's part of a batch (only for the tasks of `only`, if given)."""
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
