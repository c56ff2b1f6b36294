"""What a task is. One file in tasks/ (or in anyone's package) implements it; everything else is the platform's.

A task is an nn.Module that owns its head. It says what it takes from samples, its losses from the shared encoding,
how it is scored, and which metric chooses the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.loader import Collator
from emcl.data.text import TextSource
from emcl.distributed import Ranks
from emcl.model.backbone import Backbone, Encoded

EncodeText = Callable[[Tensor | None], Tensor | None]
"""Token ids (B, L) -> (B, D)."""


@dataclass(frozen=True)
class Example:
    """A query with what was found for it, for the picture in MLflow."""

    query: str
    right: int
    """Row of the shards."""
    found: list[int]
    """Rows, best first."""


@dataclass(frozen=True)
class Scores:
    """A task's result on one split, the same on every rank."""

    metrics: dict[str, float]
    protocol: str
    """In words: what was ranked against what, with which inference options, how many queries."""
    examples: list[Example] = field(default_factory=list)


class Scorer:
    """Collects what a task needs of each batch of an evaluation, then scores it all."""

    def add(self, encoded: Encoded, batch: Mapping[str, Any], encode_text: EncodeText) -> None:
        """One batch of this rank. `batch["rows"]` are the samples' places in the shards.

        `encode_text` is to be called exactly once, with None where there is nothing to encode.
        """
        raise NotImplementedError

    def result(self, ranks: Ranks, captions_of_row: Callable[[int], list[str]]) -> Scores:
        """Called once, by all ranks."""
        raise NotImplementedError


class Task(nn.Module):
    """Base class of tasks.

    Args:
        settings: an instance of `config_class`, from `tasks.NAME` of the configuration.
        config: the whole run's.
        backbone: gives widths; a task must not keep it.
    """

    config_class: ClassVar[type]
    """A frozen dataclass of this task's settings."""
    metric: ClassVar[str]
    """The entry of `Scores.metrics` that chooses the best checkpoint."""
    greater_is_better: ClassVar[bool] = True

    def __init__(self, settings: Any, config: Config, backbone: Backbone) -> None:
        super().__init__()

    @classmethod
    def collator(cls, settings: Any, texts: TextSource, *, training: bool) -> Collator:
        """Makes this task's part of a batch, in the loader's process; `texts` makes the text tower's input."""
        raise NotImplementedError

    def losses(self, backbone: Backbone, encoded: Encoded, part: Any, ranks: Ranks) -> dict[str, Tensor]:
        """This rank's shares: over all ranks they add up to the losses of the global batch."""
        raise NotImplementedError

    def scorer(self, config: Config) -> Scorer:
        raise NotImplementedError


def to_device(item: Any, device: torch.device) -> Any:
    """Moves the tensors of nested dictionaries and lists."""
    if isinstance(item, Tensor):
        return item.to(device, non_blocking=True)
    if isinstance(item, dict):
        return {key: to_device(value, device) for key, value in item.items()}
    if isinstance(item, list):
        return [to_device(value, device) for value in item]
    return item
