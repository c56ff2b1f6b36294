"""Which samples form global batch i: a pure function of (seed, i).

It does not depend on world size, worker count, prefetching or interruptions. Shards are read in a random order, each
mostly in sequence: samples are shuffled in a sliding buffer.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

from emcl.errors import UserError

TextKind = Literal["caption", "question"]


@dataclass(frozen=True)
class Draw:
    """One sample of a batch."""

    row: int
    caption: int | None
    """Index of the caption, or None to draw one with `seed`."""
    seed: int
    """Seed of everything random about this sample in this epoch: caption, frame times, augmentation."""
    question: int | None = None
    """Index of the question, or None to draw some with `seed`."""

    @staticmethod
    def of(seed: int, step: int, slot: int, row: int, text: int | None, kind: TextKind) -> Draw:
        """`text` is the index of a caption or a question, by `kind`."""
        number = hash((seed, step, slot)) & 0xFFFFFFFF
        return Draw(row, None, number, text) if kind == "question" else Draw(row, text, number)


@dataclass(frozen=True, kw_only=True)
class ShardSampler:
    """The endless sequence of global batches over some shards."""

    lengths: tuple[int, ...]
    """Samples in each shard."""
    texts: tuple[int, ...] | None
    """Number of captions (or questions) of each sample if each is a separate pair, else None."""
    batch_size: int
    buffer: int
    seed: int
    first_row: int = 0
    """Row of the first sample of these shards among all open shards."""
    kind: TextKind = "caption"
    """What `texts` are."""

    def __post_init__(self) -> None:
        if self.size < self.batch_size:
            raise UserError(
                f"{self.size} training samples do not fill one global batch of {self.batch_size}: lower data.batch_size"
            )

    @property
    def size(self) -> int:
        """Pairs in an epoch, before the incomplete last batch is dropped."""
        return sum(self.texts) if self.texts is not None else sum(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        return self.size // self.batch_size

    def batch(self, step: int) -> list[Draw]:
        """Global batch `step`, counted over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        pairs = _epoch(self, epoch)[within * self.batch_size : (within + 1) * self.batch_size]
        return [Draw.of(self.seed, step, slot, *pair, self.kind) for slot, pair in enumerate(pairs)]

    def pairs(self, first: int, stop: int) -> list[tuple[int, int | None]]:
        """Rows and texts of samples `first` to `stop` of the endless sequence; no sample of an epoch is dropped."""
        pairs: list[tuple[int, int | None]] = []
        while first + len(pairs) < stop:
            epoch, within = divmod(first + len(pairs), self.size)
            pairs += _epoch(self, epoch)[within : within + stop - first - len(pairs)]
        return pairs


@lru_cache(maxsize=16)
def _epoch(sampler: ShardSampler, epoch: int) -> list[tuple[int, int | None]]:
    """All pairs of an epoch. Pairs of texts go over the videos once per text: otherwise a batch would have several
    texts of the same video, which are not negatives of each other, and so fewer negatives."""
    rng = random.Random(f"{sampler.seed}/{epoch}")
    starts = [sampler.first_row + sum(sampler.lengths[:index]) for index in range(len(sampler.lengths))]
    shards = list(range(len(sampler.lengths)))
    texts: list[list[int | None]] | None = None
    if sampler.texts is not None:
        texts = [rng.sample(range(count), count) for count in sampler.texts]

    def in_sequence() -> Iterator[tuple[int, int | None]]:
        for turn in range(max(sampler.texts) if sampler.texts is not None else 1):
            rng.shuffle(shards)
            for shard in shards:
                for row in range(starts[shard], starts[shard] + sampler.lengths[shard]):
                    if texts is None:
                        yield row, None
                    elif turn < len(texts[row - sampler.first_row]):
                        yield row, texts[row - sampler.first_row][turn]

    return _buffered_shuffle(in_sequence(), sampler.buffer, rng)


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


class BatchSampler(Protocol):
    """Global batches by step."""

    @property
    def batch_size(self) -> int: ...

    @property
    def steps_per_epoch(self) -> int: ...

    def batch(self, step: int) -> list[Draw]: ...


def check_divisible(batch_size: int, world_size: int, accumulation: int) -> None:
    """Checks that a global batch divides evenly over ranks and accumulation steps.

    Raises:
        UserError: it does not; suggests the nearest batch size that does.
    """
    divisor = world_size * accumulation
    if batch_size % divisor:
        raise UserError(
            f"data.batch_size={batch_size} is not divisible by {world_size} ranks x {accumulation} accumulation "
            f"steps: take {max(1, round(batch_size / divisor)) * divisor}"
        )


class RankBatchSampler:
    """A batch sampler: this rank's share of each micro-batch, from step `start` to `stop`."""

    def __init__(
        self, sampler: BatchSampler, *, rank: int, world_size: int, accumulation: int, start: int, stop: int
    ) -> None:
        check_divisible(sampler.batch_size, world_size, accumulation)
        self.sampler, self.rank, self.world_size = sampler, rank, world_size
        self.accumulation, self.start, self.stop = accumulation, start, stop

    def __len__(self) -> int:
        return (self.stop - self.start) * self.accumulation

    @property
    def share(self) -> int:
        """Samples per micro-batch of this rank."""
        return self.sampler.batch_size // (self.world_size * self.accumulation)

    def __iter__(self) -> Iterator[Sequence[Draw]]:
        for step in range(self.start, self.stop):
            yield from self.micro_batches(step)

    def micro_batches(self, step: int) -> list[Sequence[Draw]]:
        """This rank's samples of each micro-batch."""
        batch = self.sampler.batch(step)
        share = self.share
        firsts = [(micro * self.world_size + self.rank) * share for micro in range(self.accumulation)]
        return [batch[first : first + share] for first in firsts]
