"""A rank with fewer cores than loaders is named at the start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conftest import short_run
from emcl.train.cores import host_and_cores, too_few_cores


def test_ranks_with_enough_cores_of_their_own_are_not_named() -> None:
    of_ranks = [("a", [0, 1, 2, 3]), ("a", [4, 5, 6, 7]), ("b", [0, 1, 2, 3])]
    assert too_few_cores(of_ranks, 4) is None
    assert too_few_cores(of_ranks, 0) is None


def test_the_rank_with_the_fewest_cores_is_named_with_a_way_out() -> None:
    line = too_few_cores([("a", [0, 1, 2, 3]), ("a", [4, 5, 6, 7]), ("b", [0, 1])], 4)
    assert line is not None
    for wanted in ("rank 2 on b has 2 core(s)", "data.workers=4", "--cpus-per-gpu", "data.workers=2"):
        assert wanted in line
    assert "\n" not in line


def test_ranks_that_are_not_bound_share_their_machines_cores() -> None:
    everywhere = list(range(16))
    assert too_few_cores([("a", everywhere), ("a", everywhere)], 8) is None
    assert too_few_cores([("a", everywhere), ("b", everywhere)], 16) is None
    line = too_few_cores([("a", everywhere)] * 8, 4)
    assert line is not None
    assert "16 core(s), which 8 ranks share" in line
    assert "data.workers=2" in line


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_process_bound_to_one_core_has_one() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert host_and_cores()[1] == [min(before)]
        assert too_few_cores([host_and_cores()], 2) is not None
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_training_says_it_at_the_start_and_once(
    sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        short_run(sample_shards, tmp_path, "data.workers=2", "data.augment=rand-m7-n4-mstd0.5-inc1")
    finally:
        os.sched_setaffinity(0, before)
    output = capsys.readouterr().out
    assert output.count("note: rank 0 on") == 1
    assert output.index("note: rank 0 on") < output.index("one: retrieval")
