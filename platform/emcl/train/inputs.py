"""What a training run reads, opened and checked before there is a process group: an error costs no rendezvous."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emcl.config import Config
from emcl.data.mixture import open_training
from emcl.data.order import BatchOrder, RankBatches
from emcl.data.shards import ShardSet, open_shards
from emcl.distributed import Ranks
from emcl.train.start import learn_settings


@dataclass(frozen=True)
class Inputs:
    """The same on every rank, but for `batches`, which are this rank's."""

    config: Config
    """Completed by what the training split decides."""
    shards: ShardSet
    order: BatchOrder
    batches: RankBatches
    val: ShardSet | None

    @property
    def steps(self) -> int:
        return self.batches.stop


def open_inputs(config: Config, ranks: Ranks, init: Path | None = None) -> Inputs:
    """Opens the shards of all splits and plans the steps.

    Raises:
        UserError: shards that are missing or damaged, a batch that the ranks do not divide, a task without a sample.
    """
    shards, order = open_training(config.data, config.seed)
    config = learn_settings(config, shards, init)
    batches = RankBatches(
        order,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulation=config.optim.accumulation,
        start=0,
        stop=min(config.optim.epochs * order.steps_per_epoch, config.optim.max_steps or 2**62),
    )
    return Inputs(config, shards, order, batches, open_shards(config.data.val) if config.data.val else None)
