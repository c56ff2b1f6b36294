"""What a task is. One file in tasks/ (or in anyone's package) implements it; everything else is the platform's.

A task is an nn.Module that owns its head. It says what it takes from samples, its losses from the shared encoding,
how it is scored, and which metric chooses the best checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.loader import Collator
from emcl.data.samples import Sample
from emcl.data.source import Source
from emcl.data.text import TextSource
from emcl.distributed import Ranks
from emcl.model.backbone import Backbone, Encoded
from emcl.pictures import FramesOf

Picture = Callable[[Path, FramesOf], None]
"""Draws to a path."""


@dataclass(frozen=True)
class Scores:
    """A task's result on one split, the same on every rank but for what is to be drawn and kept, which rank 0 has."""

    metrics: dict[str, float]
    protocol: str
    """In words: what was compared with what, with which options, how many queries."""
    chosen: str
    """The entry of `metrics` that chooses the best checkpoint."""
    picture: Picture | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Contents of further files to keep, by name."""
    items: dict[str, list[Any]] = field(default_factory=dict)
    """What was found of each query, column by column, for intervals and examples (`emcl report`)."""
    save: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    """Further files to keep of the test split, each written to a path."""


class Lockstep:
    """Runs a module over any number of rows in chunks, as many chunks on every rank as on the one with most.

    Under ZeRO-3 each forward pass is a collective: a rank that has nothing left goes through a filler with the others.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, size: int, device: torch.device) -> None:
        self.model, self.ranks, self.size, self.device = model, ranks, size, device

    def __call__(self, call: Callable[..., Tensor], rows: Sequence[Tensor] | None, filler: Sequence[Tensor]) -> Tensor:
        """`call(*rows)` for rows of equal length, concatenated; empty where there are none."""
        mine = [] if rows is None else list(zip(*(part.split(self.size) for part in rows), strict=True))
        chunks = int(self.ranks.maximum(torch.tensor(len(mine), device=self.device)))
        done = [self.model(None, part=partial(call, *part)) for part in mine]
        spare = [self.model(None, part=partial(call, *filler)) for _ in range(chunks - len(mine))]
        return torch.cat(done or [spare[0][:0]]) if done or spare else torch.zeros(0, device=self.device)


@dataclass(frozen=True)
class Evaluation:
    """What scorers work with besides a batch."""

    model: nn.Module
    backbone: Backbone
    source: Source
    ranks: Ranks
    device: torch.device
    lockstep: Lockstep

    def run(self, call: Callable[[], Any]) -> Any:
        """`call()` within a forward pass of the whole model, by which ZeRO-3 keeps its books; on all ranks."""
        return self.model(None, part=call)


class Scorer:
    """Collects what a task needs of each batch of an evaluation, then scores it all."""

    def add(self, encoded: Encoded, batch: Mapping[str, Any] | None, evaluation: Evaluation) -> None:
        """One batch of this rank; `batch["rows"]` are the samples' places in the shards.

        All ranks make the same number of calls. One that has run out of samples is given no batch and one encoded
        filler: it takes part in the others' forward passes (`evaluation.lockstep`) and adds nothing.
        """
        raise NotImplementedError

    def result(self, evaluation: Evaluation) -> Scores:
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
    """A frozen dataclass of this task's settings; `weight` among them is that of its loss."""
    greater_is_better: ClassVar[bool] = True
    learned: ClassVar[tuple[str, ...]] = ()
    """The settings that `learn_settings` finds."""

    def __init__(self, settings: Any, config: Config, backbone: Backbone) -> None:
        super().__init__()

    @classmethod
    def learn_settings(cls, settings: Any, config: Config, samples: Sequence[Sample]) -> Any:
        """`settings` completed by what the training split decides, such as a vocabulary.

        They become part of the run's configuration, and so of every checkpoint and export. The same on every rank.
        """
        return settings

    @classmethod
    def notices(cls) -> list[str]:
        """What this machine lacks for the task's scores, a line each: said at the start and not after the training."""
        return []

    @classmethod
    def collator(cls, settings: Any, config: Config, texts: TextSource, *, training: bool) -> Collator:
        """Makes this task's part of a batch, in the loader's process; `texts` makes the text tower's input."""
        raise NotImplementedError

    def losses(self, backbone: Backbone, encoded: Encoded, part: Any, ranks: Ranks) -> dict[str, Tensor]:
        """This rank's shares: over all ranks they add up to the losses of the global batch.

        A batch without a sample for this task gives exactly 0, by the same forward passes: other ranks may have one.
        """
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
