"""The rank that the others wait for is named with its cause, and nobody where nobody is slow."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from emcl.config import resolve
from emcl.data.loading_time import LoadingTime
from emcl.distributed import Ranks
from emcl.train.bad_clips import BadClips
from emcl.train.meter import Meter
from emcl.train.step_clock import PARTS, WAITING, StepClock
from emcl.train.stragglers import find_straggler
from forked import Program, start_ranks
from ranks import run_on_ranks
from straggler_cases import SLOW_RANK, Trial, named, says

USUAL = np.array([0.2, 0.1, 2.0, 4.0, 1.0])
SECONDS = 8.0


def work(ranks: int, seed: int) -> np.ndarray:
    """Of ranks that are alike but for 5% of noise."""
    return USUAL * np.random.default_rng(seed).normal(1, 0.05, (ranks, len(PARTS)))


@pytest.mark.parametrize("ranks", [2, 4, 512])
def test_ranks_that_are_alike_are_not_named(ranks: int) -> None:
    assert all(find_straggler(work(ranks, seed), SECONDS) is None for seed in range(100))


@pytest.mark.parametrize("ranks", [2, 4, 512])
@pytest.mark.parametrize("part", PARTS)
def test_the_slow_rank_and_its_part_are_named(ranks: int, part: str) -> None:
    for seed in range(20):
        seconds = work(ranks, seed)
        seconds[ranks - 1, PARTS.index(part)] += 5
        straggler = find_straggler(seconds, SECONDS + 5)
        assert straggler is not None and (straggler.rank, straggler.part) == (ranks - 1, part)
        assert straggler.excess == pytest.approx(5, abs=1.5)


def test_a_node_whose_ranks_are_all_slow_does_not_count_as_usual() -> None:
    seconds = work(8, 0)
    seconds[4:, PARTS.index("loading")] += 4
    straggler = find_straggler(seconds, SECONDS + 4)
    assert straggler is not None and straggler.rank >= 4 and straggler.part == "loading"


def test_one_rank_and_next_to_no_time_name_nobody() -> None:
    assert find_straggler(work(1, 0), SECONDS) is None
    assert find_straggler(np.array([[0.0] * 5, [0.01] * 5]) / 5, 0.01) is None


def test_the_clock_tells_work_from_waiting_for_others() -> None:
    clock = StepClock(torch.device("cpu"))
    with clock.part("forward"):
        time.sleep(0.05)
        with clock.wait():
            time.sleep(0.1)
    with clock.wait():  # of an evaluation between steps
        time.sleep(0.05)
    clock.loaded(0.3)
    seconds = clock.read()
    assert seconds["loading"] == 0.3
    assert seconds["forward"] == pytest.approx(0.05, abs=0.03)
    assert seconds[WAITING] == pytest.approx(0.1, abs=0.03)
    assert sum(clock.read().values()) == 0


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([("a", 0.1, 0.2), ("b", 0.1, 3.0)], "decoding: b alone took 3.1 s"),
        ([("a", 1.0, 0.2), ("b", 1.1, 0.1), ("c", 1.0, 0.1)], "reading shards: 3.1 s of the loaders' 3.5"),
        ([], ""),
    ],
)
def test_loading_says_whether_it_read_or_decoded_and_which_clip(
    samples: list[tuple[str, float, float]], said: str
) -> None:
    assert sum((LoadingTime.of_sample(*sample) for sample in samples), LoadingTime()).detail() == said


def _read_late(ranks: Ranks, folder: Path) -> tuple[float, str]:
    """A report of a rank that loads for 2 s, of 4 by its own clock and of 40 by the other's."""
    meter = Meter(resolve(["retrieval"]), ranks, torch.device("cpu"), BadClips(ranks, folder, 10, 0.1, []))
    meter.began -= 40 if ranks.first else 4
    meter.clock.loaded(0.0 if ranks.first else 2.0)
    figures, line = meter.read(restarts=0)
    return figures["data_wait_share"], line


def test_ranks_whose_clocks_differ_find_the_same(tmp_path: Path) -> None:
    """Else one waits for details that the others do not send."""
    (share, line), other = run_on_ranks(_read_late, 2, tmp_path, tmp_path)
    assert (share, line) == other
    assert share == pytest.approx(1 / 40, rel=0.01)


@pytest.mark.parametrize(
    ("trial", "seconds"),
    [(Trial(2, "compute", 1), "0.5"), (Trial(2, "disk", 0), "0.8"), (Trial(2, "clip", 1), "6.0")],
    ids=lambda value: value.kind if isinstance(value, Trial) else "",
)
def test_a_real_run_names_the_slow_rank_and_its_cause(trial: Trial, seconds: str, sample_shards: Path) -> None:
    """Slow enough to stand out beside other tests; finer differences, and clean runs: benchmarks/straggler_cases.py."""
    settings = ("optim.epochs=10", "optim.max_steps=24", "data.batch_size=2")

    def forked(arguments: list[str], ranks: int, environment: dict[str, str], cwd: Path, log: Path) -> list[Program]:
        return start_ranks(SLOW_RANK, arguments, ranks, env=environment, cwd=cwd, stdout=log)

    lines = named(trial, sample_shards, *settings, seconds=seconds, start=forked)
    assert any(says(line, trial) for line in lines), lines
