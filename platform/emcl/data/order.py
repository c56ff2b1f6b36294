"""Which samples form global batch i: a pure function of (seed, i).

World size, worker count, prefetching and interruptions do not enter. Shards are drawn in a random order and read
mostly in sequence: samples are shuffled within a buffer that slides over them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from emcl.errors import UserError


@dataclass(frozen=True)
class Draw:
    """One sample of a batch."""

    row: int
    caption: int | None
    """Which caption, or None for one drawn with `seed`."""
    seed: int
    """Of everything random about this sample in this epoch: caption, frame times, augmentation."""

    @staticmethod
    def of(seed: int, step: int, slot: int, row: int, caption: int | None) -> Draw:
        return Draw(row, caption, hash((seed, step, slot)) & 0xFFFFFFFF)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The endless sequence of global batches over some shards."""

    lengths: tuple[int, ...]
    """Samples in each shard."""
    captions: tuple[int, ...] | None
    """Captions of each sample where each is a pair of its own, else None."""
    batch_size: int
    buffer: int
    seed: int
    first_row: int = 0
    """Of these shards among all that are open."""

    def __post_init__(self) -> None:
        if self.size < self.batch_size:
            raise UserError(
                f"{self.size} training samples do not fill one global batch of {self.batch_size}: lower data.batch_size"
            )

    @property
    def size(self) -> int:
        """Pairs in an epoch, before the incomplete last batch is left out."""
        return sum(self.captions) if self.captions is not None else sum(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.batch_size

    def batch(self, step: int) -> list[Draw]:
        """Global batch `step`, counted over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        pairs = _epoch(self, epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        return [Draw.of(self.seed, step, slot, *pair) for slot, pair in enumerate(pairs)]

    def pairs(self, first: int, stop: int) -> list[tuple[int, int | None]]:
        """Rows and captions of the endless sequence's samples `first` to `stop`, no sample of an epoch left out."""
        found: list[tuple[int, int | None]] = []
        while first + len(found) < stop:
            epoch, within = divmod(first + len(found), self.size)
            found += _epoch(self, epoch)[within : within + stop - first - len(found)]
        return found


@lru_cache(maxsize=16)
def _epoch(order: Order, epoch: int) -> list[tuple[int, int | None]]:
    """All pairs of an epoch. Caption pairs go through the videos once for each caption: a batch would else hold
    several captions of one video, which are no negatives of each other, and so few negatives."""
    rng = random.Random(f"{order.seed}/{epoch}")
    starts = [order.first_row + sum(order.lengths[:index]) for index in range(len(order.lengths))]
    shards = list(range(len(order.lengths)))
    captions: list[list[int | None]] | None = None
    if order.captions is not None:
        captions = [rng.sample(range(count), count) for count in order.captions]

    def in_sequence() -> Iterator[tuple[int, int | None]]:
        for turn in range(max(order.captions) if order.captions is not None else 1):
            rng.shuffle(shards)
            for shard in shards:
                for row in range(starts[shard], starts[shard] + order.lengths[shard]):
                    if captions is None:
                        yield row, None
                    elif turn < len(captions[row - order.first_row]):
                        yield row, captions[row - order.first_row][turn]

    return _buffered_shuffle(in_sequence(), order.buffer, rng)


def _buffered_shuffle(
    items: Iterator[tuple[int, int | None]], size: int, rng: random.Random
) -> list[tuple[int, int | None]]:
    buffer: list[tuple[int, int | None]] = []
    out = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        slot = rng.randrange(size)
        out.append(buffer[slot])
        buffer[slot] = item
    rng.shuffle(buffer)
    return out + buffer


class BatchOrder(Protocol):
    """Global batches by their step."""

    @property
    def batch_size(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def batch(self, step: int) -> list[Draw]: ...


def check_divisible(batch_size: int, world_size: int, accumulation: int) -> None:
    """Whether a global batch is so many equal parts.

    Raises:
        UserError: it is not; names the nearest that is.
    """
    parts = world_size * accumulation
    if batch_size % parts:
        raise UserError(
            f"data.batch_size={batch_size} is not divisible by {world_size} ranks x {accumulation} accumulation "
            f"steps: take {max(1, round(batch_size / parts)) * parts}"
        )


class RankBatches:
    """A batch sampler: this rank's part of each micro-batch, from `start` (a step) to `stop`."""

    def __init__(
        self, order: BatchOrder, *, rank: int, world_size: int, accumulation: int, start: int, stop: int
    ) -> None:
        check_divisible(order.batch_size, world_size, accumulation)
        self.order, self.rank, self.world_size = order, rank, world_size
        self.accumulation, self.start, self.stop = accumulation, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    @property
    def share(self) -> int:
        """Samples of this rank in a micro-batch."""
        return self.order.batch_size // (self.world_size * self.accumulation)

    def __iter__(self) -> Iterator[Sequence[Draw]]:
        for step in range(self.start, self.stop):
            yield from self.parts(step)

    def parts(self, step: int) -> list[Sequence[Draw]]:
        """This rank's samples of each micro-batch."""
        batch = self.order.batch(step)
        share = self.share
        firsts = [(micro * self.world_size + self.rank) * share for micro in range(self.accumulation)]
        return [batch[first : first + share] for first in firsts]
