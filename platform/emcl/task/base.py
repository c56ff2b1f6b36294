"""The base class of tasks: an nn.Module that owns its head.

It defines what it takes from samples, its losses from the shared encoding, how it is scored, by which metric its best
checkpoint is chosen, what a report shows of it, and what it predicts for people who only use the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from emcl.config import Config
from emcl.data.captions import TextSource
from emcl.data.loader import Collator
from emcl.data.samples import Sample
from emcl.distributed import Ranks
from emcl.model.backbone import Backbone, Encoded
from emcl.task.prediction import Offer, Prediction
from emcl.task.scorer import Scorer
from emcl.task.task_report import TaskReport


class Task(nn.Module):
    """Base class of tasks.

    Args:
        settings: an instance of `config_class`, from `tasks.NAME` of the configuration.
        config: the run's configuration.
        backbone: gives widths; a task must not keep it.
    """

    config_class: ClassVar[type]
    """A frozen dataclass of this task's settings; `weight` among them is that of its loss."""
    scorer_class: ClassVar[type[Scorer]]
    """How it is scored; made anew for each evaluation, with the task."""
    report: ClassVar[TaskReport] = TaskReport()
    """What `emcl report` shows of it."""
    offer: ClassVar[Offer | None] = None
    """How users reach `predict`; None for a task that predicts nothing."""
    greater_is_better: ClassVar[bool] = True
    """Whether the best checkpoint is the one with the highest `Scores.chosen`; False for a loss or a rank."""
    learned: ClassVar[tuple[str, ...]] = ()
    """The settings that `learn_settings` finds; a run that starts with `--init` keeps those of the earlier one."""

    def __init__(self, settings: Any, config: Config, backbone: Backbone) -> None:
        super().__init__()

    @classmethod
    def learn_settings(cls, settings: Any, config: Config, samples: Sequence[Sample]) -> Any:
        """`settings` completed from the training split, such as by a vocabulary.

        They become part of the run's configuration, and so of every checkpoint and export. The same on every rank.

        Raises:
            UserError: the samples have nothing for this task; the task's name is prefixed to the message.
        """
        return settings

    @classmethod
    def placeholder_settings(cls, settings: Any, config: Config) -> Any:
        """`settings` with a likely guess of what `learn_settings` finds, to plan runs whose shards are missing."""
        return settings

    @classmethod
    def notices(cls) -> list[str]:
        """What this machine lacks for the task's scores, a line each: printed at the start, not after the training."""
        return []

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        """Makes this task's part of a batch, in the loader's process; `texts` makes the text tower's input."""
        raise NotImplementedError

    def losses(self, backbone: Backbone, encoded: Encoded, inputs: Any, ranks: Ranks) -> dict[str, Tensor]:
        """This rank's shares: over all ranks they add up to the losses of the global batch.

        A batch without a sample for this task gives exactly 0, by the same forward passes: other ranks may have one.
        """
        raise NotImplementedError

    def predict(
        self, backbone: Backbone, encoded: Encoded, question: str | None = None, *, top: int = 1
    ) -> list[list[Prediction]]:
        """For each video at least one prediction and at most `top`, the likeliest first.

        Called in evaluation mode, without gradients.

        Args:
            question: for a task whose `offer` has one.
        """
        raise NotImplementedError
