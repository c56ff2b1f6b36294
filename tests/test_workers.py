"""Loader processes that die, hang or stall: started again with the same batches, or named, and none is left behind."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import Process, current_process, resource_sharer
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from conftest import small
from emcl.config import resolve
from emcl.data import loader as loaders
from emcl.data import workers
from emcl.data.batch import Batch
from emcl.data.data_settings import DataConfig
from emcl.data.resilient_loader import ResilientLoader
from emcl.data.sampler import RankBatchSampler, ShardSampler
from emcl.data.shards import ShardSet
from emcl.data.split import Split, open_split
from emcl.distributed import ALONE
from emcl.errors import OneRankError
from emcl.evaluate.driver import evaluate
from emcl.model.backbone import tokenizer_of
from emcl.multitask import VideoLanguageModel
from emcl.train.preemption import StopRequest

CPU = torch.device("cpu")
DATA = DataConfig(frames=4, image_size=32, batch_size=6, workers=2)


def step_loader(split: Split, data: DataConfig, steps: int) -> ResilientLoader:
    sampler = ShardSampler(lengths=tuple(split.shards.lengths), texts=None, batch_size=6, buffer=8, seed=0)
    batches = RankBatchSampler(sampler, rank=0, world_size=1, accumulation=1, start=0, stop=steps)
    return ResilientLoader(split, data, batches, {})


def children() -> list[psutil.Process]:
    return [one for one in psutil.Process().children() if one.status() != psutil.STATUS_ZOMBIE]


def test_loaders_that_were_killed_start_again_and_give_the_same_batches(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "LOOK", 0.5)
    split = open_split(f"{sample_shards}/train-*.tar")
    next(iter(loaders.evaluation_loader(split, DATA, {}, batch_size=3, rank=0, world_size=1)))  # PyTorch's handler
    calm = [batch for (batch,) in step_loader(split, DATA, 12).steps(0)]
    troubled = step_loader(split, DATA, 12)
    before = {one.pid for one in children()}
    batches: list[Batch] = []
    for step, (batch,) in enumerate(troubled.steps(0)):
        batches.append(batch)
        if step in (2, 7):
            for worker in children():
                if worker.pid not in before:
                    os.kill(worker.pid, signal.SIGKILL)
            time.sleep(0.2)  # the step that goes on meanwhile is not disturbed
    assert troubled.restarts == 2
    assert [batch.ids for batch in batches] == [batch.ids for batch in calm]
    for one, other in zip(batches, calm, strict=True):
        torch.testing.assert_close(one.videos.frames, other.videos.frames, rtol=0, atol=0)


def test_a_loader_killed_while_its_batch_is_fetched_starts_again(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "LOOK", 0.5)
    split = open_split(f"{sample_shards}/train-*.tar")
    calm = [batch.ids for (batch,) in step_loader(split, DATA, 6).steps(0)]
    connect, calls = resource_sharer._resource_sharer.get_connection, itertools.count()

    def connected(ident: Any) -> Any:
        """What the kernel says for as long as a killed process has closed its sockets and is not reaped."""
        if next(calls) == 4:
            raise ConnectionResetError(104, "Connection reset by peer")
        return connect(ident)

    monkeypatch.setattr(resource_sharer._resource_sharer, "get_connection", connected)
    troubled = step_loader(split, DATA, 6)
    assert [batch.ids for (batch,) in troubled.steps(0)] == calm
    assert troubled.restarts == 1


def test_loaders_that_die_at_every_start_end_the_run(sample_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "LOOK", 0.5)
    monkeypatch.setattr(ShardSet, "read", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    split = open_split(f"{sample_shards}/train-*.tar")
    with pytest.raises(OneRankError, match="rank 0 were killed 4 times at step 1.*data.workers"):
        next(step_loader(split, DATA, 4).steps(0))


def test_loaders_that_give_nothing_are_named_with_what_they_read(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "LOOK", 0.5)
    monkeypatch.setattr(ShardSet, "read", lambda *_: time.sleep(3600))
    split = open_split(f"{sample_shards}/train-*.tar")
    with pytest.raises(OneRankError, match=r"waited 1 s .* step 1: loader 0 of 2 reads .*train-00000[01]\.tar"):
        next(step_loader(split, replace(DATA, patience=1.0), 4).steps(0))


class Hanging:
    """Of the next processes that are forked, those with these numbers hang before their first line."""

    def __init__(self, numbers: Iterable[int]) -> None:
        last = int(Process().name.rpartition("-")[2])
        self.names = {f"Process-{last + 1 + number}" for number in numbers}
        register_after_fork(self, Hanging.hang)  # for as long as this object lives

    def hang(self) -> None:
        while current_process().name in self.names:
            time.sleep(1)


@contextmanager
def hanging(*numbers: int) -> Iterator[None]:
    """As in a run, whose processes begin with its answer to SIGTERM."""
    with StopRequest():
        hook = Hanging(numbers)
        yield
        del hook


def test_a_loader_process_that_hangs_at_its_start_is_replaced(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "BIRTH", 2.0)
    split = open_split(f"{sample_shards}/train-*.tar")
    calm = [batch.ids for (batch,) in step_loader(split, DATA, 4).steps(0)]
    before = children()
    with hanging(0):
        assert [batch.ids for (batch,) in step_loader(split, DATA, 4).steps(0)] == calm
    assert "rank 0: 1 of 2 loader processes hung at their start" in "".join(capfd.readouterr())
    assert children() == before


def test_one_that_hangs_when_they_start_again_is_replaced_too(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BIRTH", 2.0)
    split = open_split(f"{sample_shards}/train-*.tar")
    before = children()
    with hanging(0, 3):  # of each start the other one
        loader = loaders.evaluation_loader(split, DATA, {}, batch_size=5, rank=0, world_size=1)
        ids = [name for batch in workers.start_workers(loader, 0) for name in batch.ids]
    assert ids == [row.sample.id for row in split.shards.rows]
    assert children() == before


def test_so_it_is_in_an_evaluation(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(workers, "BIRTH", 2.0)
    config = resolve(["retrieval"], "sample", small(sample_shards))
    model, split = VideoLanguageModel(config), open_split(f"{sample_shards}/val-*.tar", tokenizer_of(config))
    with hanging(0):
        scores = evaluate(model.eval(), split, config, ALONE, CPU, name="val")
    assert "1 of 1 loader processes hung at their start" in "".join(capfd.readouterr())
    assert "8 videos" in scores["retrieval"].protocol


def test_loader_processes_that_hang_at_every_start_are_an_error(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "BIRTH", 0.2)
    split = open_split(f"{sample_shards}/train-*.tar")
    before = children()
    with (
        hanging(*range(100)),
        pytest.raises(OneRankError, match=r"of rank 0 gave no sign of life within 0 s, 3 times; data\.workers=0"),
    ):
        next(step_loader(split, DATA, 4).steps(0))
    assert children() == before


def test_loaders_that_a_file_server_holds_do_not_hold_the_run(
    sample_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM does not end them, as it does not end one that is stopped; what waits for them waits for ever."""
    monkeypatch.setattr(loaders, "LOOK", 0.5)
    monkeypatch.setattr(ShardSet, "read", lambda *_: os.kill(os.getpid(), signal.SIGSTOP))
    split = open_split(f"{sample_shards}/train-*.tar")
    before = children()
    with pytest.raises(OneRankError, match="waited 1 s"):
        next(step_loader(split, replace(DATA, patience=1.0), 4).steps(0))
    assert children() == before
