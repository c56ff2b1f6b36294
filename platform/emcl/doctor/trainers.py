"""Small real runs for the checks: the platform's own trainer on a few clips, without records."""

from __future__ import annotations

import gc
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from emcl import distributed
from emcl.config import Config, resolve
from emcl.data.batch import Batch
from emcl.data.loader import Collator
from emcl.data.resilient_loader import ResilientLoader
from emcl.data.sampler import RankBatchSampler
from emcl.data.split import Split
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.prepare.sample_set import generate
from emcl.run_folder import RunFolder
from emcl.tracking import Tracker
from emcl.train.arithmetic import set_arithmetic
from emcl.train.initialization import open_splits
from emcl.train.loop import Trainer

ALL_TASKS = ("retrieval", "captioning", "msrvtt_qa")
CLIPS = {"train": 128, "val": 16, "test": 16}


@dataclass(frozen=True)
class Bench:
    """What the checks run on: this device, some sample clips, a folder for what they write."""

    ranks: Ranks
    device: torch.device
    shards: Path
    folder: Path

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


def open_bench(folder: Path, shards: Path | None) -> Bench:
    """Joins a group of one rank, and renders some sample clips unless `shards` has a folder of them.

    Raises:
        UserError: `shards` holds no training shard.
    """
    if shards is not None and not list(shards.glob("train-*.tar")):
        raise UserError(f"--shards {shards}: no train-*.tar in it; without --shards some clips are rendered")
    if shards is None:
        shards = folder / "shards"
        generate(shards, counts=CLIPS, seed=0, shard_size=64)
    distributed.quiet_start()
    ranks = distributed.start()
    return Bench(ranks, distributed.device(), shards, folder)


def settings(bench: Bench, *overrides: str, tasks: Sequence[str] = ("retrieval",)) -> Config:
    """The sample recipe on the bench's clips, with `overrides`."""
    own = [
        "data.generate=false", f"data.train={bench.shards}/train-*.tar", "data.val=null", "data.test=null",
        "tracking.enabled=false", "data.batch_size=16", "data.workers=0", f"runs={bench.folder}/runs",
        "optim.epochs=1000", "checkpoint.every_steps=100000",
    ]  # fmt: skip
    return resolve(list(tasks), "sample", [*own, *overrides])


@contextmanager
def trainer(bench: Bench, config: Config, name: str, *, resuming: bool = False) -> Iterator[Trainer]:
    """A trainer whose memory is freed at the end."""
    set_arithmetic(config)
    folder = RunFolder(bench.folder / name)
    made = Trainer(*open_splits(config), bench.ranks, bench.device, folder, resuming=resuming)
    made.tracker = Tracker()
    made.engine.train()
    try:
        yield made
    finally:
        made.engine.destroy()
        del made
        free(bench.device)


def batches_of(
    training: Split, config: Config, steps: int, collators: Mapping[str, Collator]
) -> Generator[list[Batch], None, None]:
    """The micro-batches of the first `steps` steps, for a single rank, without a model."""
    assert training.sampler is not None
    batches = RankBatchSampler(training.sampler, rank=0, world_size=1, accumulation=1, start=0, stop=steps)
    yield from ResilientLoader(training, config.data, batches, collators).steps(0)


def free(device: torch.device) -> None:
    """Frees unused memory."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def losses_of(made: Trainer, steps: int) -> list[float]:
    """The loss of each of so many steps from the start of the data."""
    return [sum(float(loss) for loss in one_step(made, step, batches).values()) for step, batches in taken(made, steps)]


def taken(made: Trainer, steps: int, start: int = 0) -> Iterator[tuple[int, list[Batch]]]:
    """The number and the batches of each of so many steps."""
    stream = made._steps(start)
    for step in range(start, start + steps):
        batches, _ = next(stream)
        yield step, batches


def one_step(made: Trainer, step: int, batches: list[Batch]) -> dict[str, torch.Tensor]:
    """One step, as in the training loop."""
    made._seed(step)
    return made._step(batches)
