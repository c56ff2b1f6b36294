"""The training data: one set of shards, or several mixed by weight, and the order of their samples."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from emcl.data.data_settings import DataConfig
from emcl.data.sampler import Draw, ShardSampler
from emcl.data.shards import ShardSet, find_shards
from emcl.errors import UserError
from emcl.recipe import read_yaml
from emcl.resources import configs_folder, is_file


def training_patterns(data: DataConfig) -> dict[str, float]:
    """Shard pattern of each set -> its weight; a file name of configs/data stands for that file's `train`.

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


def open_training(data: DataConfig, seed: int) -> tuple[ShardSet, ShardSampler | MixtureSampler]:
    """The shards of all sets as one set, and the sampler of global batches."""
    patterns = training_patterns(data)
    paths = _without_validation([find_shards(pattern) for pattern in patterns], data)
    shards = ShardSet([path for set_paths in paths for path in set_paths], data.max_bad_fraction)
    samplers, first = [], 0
    for set_paths in paths:
        samplers.append(_sampler(shards, range(first, first + len(set_paths)), data, seed, alone=len(paths) == 1))
        first += len(set_paths)
    if len(samplers) == 1:
        return shards, samplers[0]
    counts = shares(list(patterns.values()), data.batch_size)
    return shards, MixtureSampler(samplers=tuple(samplers), counts=counts, seed=seed)


def _without_validation(paths: list[list[Path]], data: DataConfig) -> list[list[Path]]:
    """Each set's shards without those that are validated on; all, where they are the same."""
    held: set[Path] = set()
    if data.val:
        with suppress(UserError):  # a missing one is named elsewhere
            held = {path.resolve() for path in find_shards(data.val)}
    return [[path for path in of_set if path.resolve() not in held] or of_set for of_set in paths]


def _sampler(shards: ShardSet, chosen: range, data: DataConfig, seed: int, *, alone: bool) -> ShardSampler:
    rows = [row for row in shards.rows if row.shard in chosen]
    counts = None
    if data.pairs == "caption":
        counts = tuple(len(row.sample.captions[: data.captions_per_video]) for row in rows)
    elif data.pairs == "question":
        counts = tuple(len(row.sample.qa) for row in rows)
        if not any(counts):
            shown = shards.paths[chosen.start].parent
            raise UserError(
                f"data.pairs=question: no sample in {shown} has a question; take data.pairs=caption or clip"
            )
    return ShardSampler(
        lengths=tuple(shards.lengths[number] for number in chosen),
        texts=counts,
        kind="question" if data.pairs == "question" else "caption",
        batch_size=data.batch_size if alone else 1,
        buffer=data.shuffle_buffer,
        seed=seed,
        first_row=sum(shards.lengths[: chosen.start]),
    )


@dataclass(frozen=True, kw_only=True)
class MixtureSampler:
    """Global batches with a fixed number of samples from each set; a pure function of (seed, step).

    Each set has its own epochs, independent of the other sets.
    """

    samplers: tuple[ShardSampler, ...]
    counts: tuple[int, ...]
    """Samples of each set in every batch."""
    seed: int

    @property
    def batch_size(self) -> int:
        return sum(self.counts)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until as many samples were drawn as all sets contain together."""
        return max(1, sum(sampler.size for sampler in self.samplers) // self.batch_size)

    def batch(self, step: int) -> list[Draw]:
        pairs = [
            pair
            for sampler, count in zip(self.samplers, self.counts, strict=True)
            for pair in sampler.pairs(step * count, (step + 1) * count)
        ]
        random.Random(f"{self.seed}/mixture/{step}").shuffle(pairs)  # so that each rank gets samples of every set
        kind = self.samplers[0].kind  # the same for all
        return [Draw.of(self.seed, step, slot, *pair, kind) for slot, pair in enumerate(pairs)]


def shares(weights: Sequence[float], batch_size: int) -> tuple[int, ...]:
    """Samples of each set in a batch: integers proportional to the weights, by the largest-remainder method.

    Raises:
        UserError: a set would get no sample.
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
