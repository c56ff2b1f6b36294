"""A training step's batches, from loader processes that may die or stall.

The order of samples is a pure function of (seed, step), so if a worker dies, the loader is restarted at the missing
step and gives the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from tqdm import tqdm

from emcl.data.bad_samples import LISTED
from emcl.data.batch import Batch
from emcl.data.data_settings import DataConfig
from emcl.data.loader import Collator, training_loader
from emcl.data.sampler import RankBatchSampler
from emcl.data.split import Split
from emcl.data.workers import end_workers, start_workers
from emcl.errors import OneRankError, first_line

RESTARTS = 3
"""How often the loader may be restarted for one step."""


class ResilientLoader:
    """All micro-batches of each of this rank's steps."""

    def __init__(
        self, split: Split, data: DataConfig, batches: RankBatchSampler, collators: Mapping[str, Collator]
    ) -> None:
        self.split, self.data, self.batches = split, data, batches
        self._open = lambda: training_loader(split, data, batches, collators)
        self.restarts = 0
        """Restarts since this object was created."""

    def steps(self, start: int) -> Iterator[list[Batch]]:
        """From step `start` to the last one of `batches`.

        Raises:
            OneRankError: workers die more than RESTARTS times at one step, or no batch for `data.patience` seconds.
        """
        step, lost = start, 0
        while step < self.batches.stop:
            self.batches.start = step
            loader = start_workers(self._open(), self.batches.rank)
            try:
                for step in range(self.batches.start, self.batches.stop):
                    micro_batches = [self._next(loader, step, micro) for micro in range(self.batches.accumulation)]
                    lost = 0
                    yield micro_batches
                return
            except _WorkerDied as error:
                lost += 1
                self.restarts += 1
                if lost > RESTARTS:
                    raise OneRankError(
                        f"loader processes of rank {self.batches.rank} were killed {lost} times at step {step + 1} "
                        f"({error}): too little memory, perhaps; lower data.workers or data.cache_gib"
                    ) from None
                tqdm.write(f"rank {self.batches.rank}, step {step + 1}: {error}; its loaders start again there")
            finally:
                del loader

    def _next(self, loader: Iterator[Any], step: int, micro: int) -> Batch:
        began = time.monotonic()
        while True:
            try:
                return self._whole(next(loader), step)
            except (ConnectionError, EOFError) as error:
                # killed while a batch was being received from it: its sockets close before it is reported dead
                raise _WorkerDied(f"a loader process closed its connection ({first_line(error)})") from None
            except RuntimeError as error:  # PyTorch raises no more specific class
                if "exited unexpectedly" in str(error):
                    raise _WorkerDied(first_line(error)) from None
                if "timed out after" not in str(error):
                    raise
                if time.monotonic() - began > self.data.patience:
                    end_workers(loader)
                    raise OneRankError(self._waiting_for(step, micro)) from None

    def _whole(self, batch: Batch, step: int) -> Batch:
        """Checks that the batch is complete: ranks with different batch sizes would deadlock."""
        if len(batch.ids) < self.batches.share:
            raise OneRankError(
                f"rank {self.batches.rank}, step {step + 1}: no clip decodes among a sample and those after it: "
                + "; ".join(batch.bad[:LISTED])
            )
        return batch

    def _waiting_for(self, step: int, micro: int) -> str:
        number = (step - self.batches.start) * self.batches.accumulation + micro
        draws = self.batches.micro_batches(step)[micro]
        of_split = self.split.shards
        shards = sorted({str(of_split.paths[of_split.rows[draw.row].shard]) for draw in draws})
        return (
            f"rank {self.batches.rank} has waited {self.data.patience:.0f} s (data.patience) for its batch of step "
            f"{step + 1}: loader {number % self.data.workers} of {self.data.workers} reads {', '.join(shards[:4])}"
            + (f" and {len(shards) - 4} more" if len(shards) > 4 else "")
        )


class _WorkerDied(Exception):  # noqa: N818, it is mended
    pass
