"""What is trained on: one set of shards, or several mixed by weight, and the order of their samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from emcl.data.order import Draw, Order
from emcl.data.settings import DataConfig
from emcl.data.shards import ShardSet, find_shards
from emcl.errors import UserError
from emcl.recipe import read_yaml
from emcl.shipped import configs_folder, is_file


def training_patterns(data: DataConfig) -> dict[str, float]:
    """Shards of each set with its weight; a name of configs/data stands for the `train` of that file.

    Raises:
        UserError: a named file sets no `data.train`.
    """
    if data.mixture is None:
        return {data.train: 1.0}
    patterns: dict[str, float] = {}
    for name, weight in data.mixture.items():
        pattern = _pattern(name, data.root)
        if pattern in patterns:
            raise UserError(f"data.mixture: {name} is {pattern}, which stands there already")
        patterns[pattern] = weight
    return patterns


def _pattern(name: str, root: str) -> str:
    name = name.replace("${data.root}", root)  # OmegaConf fills in values, not keys
    path = configs_folder() / "data" / f"{name}.yaml"
    if not is_file(path):
        return name
    try:
        return str(read_yaml(path)["data"]["train"])
    except (TypeError, KeyError):
        raise UserError(f"data.mixture: {path} sets no data.train") from None


def open_training(data: DataConfig, seed: int) -> tuple[ShardSet, Order | Mixture]:
    """All sets' shards as one, and the order of global batches over them."""
    patterns = training_patterns(data)
    paths = [find_shards(pattern) for pattern in patterns]
    shards = ShardSet([path for part in paths for path in part], data.max_bad_fraction)
    orders, first = [], 0
    for part in paths:
        orders.append(_order(shards, range(first, first + len(part)), data, seed, alone=len(paths) == 1))
        first += len(part)
    if len(orders) == 1:
        return shards, orders[0]
    counts = shares(list(patterns.values()), data.batch_size)
    return shards, Mixture(orders=tuple(orders), counts=counts, seed=seed)


def _order(shards: ShardSet, chosen: range, data: DataConfig, seed: int, *, alone: bool) -> Order:
    rows = [row for row in shards.rows if row.shard in chosen]
    counts = None
    if data.pairs == "caption":
        counts = tuple(len(row.sample.captions[: data.captions_per_video]) for row in rows)
    return Order(
        lengths=tuple(shards.lengths[number] for number in chosen),
        captions=counts,
        batch_size=data.batch_size if alone else 1,
        buffer=data.shuffle_buffer,
        seed=seed,
        first_row=sum(shards.lengths[: chosen.start]),
    )


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Global batches with a fixed number of samples of each set; a pure function of (seed, step).

    Each set is gone through in its own epochs, however often that is.
    """

    orders: tuple[Order, ...]
    counts: tuple[int, ...]
    """Of each set in every batch."""
    seed: int

    @property
    def batch_size(self) -> int:
        return sum(self.counts)

    @property
    def steps_per_epoch(self) -> int:
        """As many samples as all sets hold together."""
        return max(1, sum(order.size for order in self.orders) // self.batch_size)

    def batch(self, step: int) -> list[Draw]:
        pairs = [
            pair
            for order, count in zip(self.orders, self.counts, strict=True)
            for pair in order.pairs(step * count, (step + 1) * count)
        ]
        random.Random(f"{self.seed}/mixture/{step}").shuffle(pairs)  # each rank gets its part of every set
        return [Draw.of(self.seed, step, slot, *pair) for slot, pair in enumerate(pairs)]


def shares(weights: Sequence[float], batch_size: int) -> tuple[int, ...]:
    """How many of a batch's samples each weight gets: whole numbers, by largest remainders.

    Raises:
        UserError: a weight that gets none.
    """
    exact = [batch_size * weight / sum(weights) for weight in weights]
    counts = [int(number) for number in exact]
    by_remainder = sorted(range(len(exact)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: batch_size - sum(counts)]:
        counts[index] += 1
    if min(counts) == 0:
        raise UserError(
            f"data.mixture: weights {list(weights)} leave a set without a sample in {batch_size} (data.batch_size)"
        )
    return tuple(counts)
