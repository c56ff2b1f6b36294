"""Killed runs go on as if nothing had happened: losses and weights to the bit, one MLflow run, whole checkpoints."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import LAUNCH, deepspeed_command, launch, launch_environment, losses, recorded, small
from emcl.errors import UserError
from emcl.run_folder import MANIFEST, RunFolder, checkpoints_in
from emcl.train import checkpoint
from emcl.train.reshard import PART
from forked import start_ranks

STEPS = 40
CAPTIONS = ["tasks.captioning.width=64", "tasks.captioning.layers=1"]
"""A task besides, whose dropout draws in every step, as augmentation does."""


def settings(shards: Path, stage: int) -> list[str]:
    """Augmentation draws in every step."""
    return [
        *small(shards), "data.val=null", "data.test=null", f"optim.max_steps={STEPS}", "optim.epochs=100", "name=run",
        "optim.lr=1e-3", "optim.backbone_lr=1e-3", "checkpoint.every_steps=7",
        f"deepspeed=deepspeed/zero{stage}.json", "data.augment=rand-m7-n4-mstd0.5-inc1",
    ]  # fmt: skip


def killed(arguments: list[str], cwd: Path, at: int) -> None:
    """SIGKILL to two ranks and all their processes once step `at` is reached."""
    log = cwd / "killed.log"
    log.write_text("")
    ranks = start_ranks(LAUNCH, arguments, 2, env=launch_environment(), cwd=cwd, stdout=log)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        reached = [int(step) for step in re.findall(rf"(\d+)/{STEPS} \[", log.read_text())]
        if reached and max(reached) >= at:
            break
        assert all(rank.poll() is None for rank in ranks), log.read_text()[-3000:]
        time.sleep(0.02)
    for rank in ranks:
        rank.kill_session()
        rank.wait()


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize("stage", [0, 3])
def test_forty_steps_killed_and_resumed_are_the_same_to_the_bit(
    stage: int, sample_shards: Path, tmp_path: Path
) -> None:
    rng = random.Random(stage)
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    whole.mkdir()
    torn.mkdir()
    arguments = ["--task", "retrieval,captioning", *settings(sample_shards, stage), *CAPTIONS]
    done = launch(*arguments, *recorded(whole), cwd=whole, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    killed([*arguments, *recorded(torn)], torn, rng.randint(9, 20))
    killed(["--resume", "auto"], torn, rng.randint(22, 34))
    done = launch("--resume", "auto", cwd=torn, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(torn) == losses(whole)
    weights, others = (load_file(cwd / "runs/run/best/model.safetensors") for cwd in (whole, torn))
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


@pytest.fixture(scope="module")
def twelve(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """By ZeRO stage, a run of 12 steps on two ranks with the checkpoint of step 6 as its last.

    The text tower is frozen, and not as a run's own seed would make it: it comes from another run.
    """
    first = tmp_path_factory.mktemp("first")
    short = [*settings(sample_shards, 1), "optim.max_steps=1", "seed=5"]
    done = launch("--task", "retrieval", *short, cwd=first)
    assert done.returncode == 0, done.stdout + done.stderr

    @cache
    def of_stage(stage: int) -> Path:
        cwd = tmp_path_factory.mktemp(f"zero{stage}")
        short = [*settings(sample_shards, stage), "optim.max_steps=12", "checkpoint.keep=50", "model.frozen=[text]"]
        start = ["--init", str(first / "runs/run"), *recorded(cwd)]
        done = launch("--task", "retrieval", *short, *start, cwd=cwd, ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
        forget_after(cwd, 6)
        return cwd

    return of_stage


def forget_after(cwd: Path, step: int) -> None:
    for path in checkpoints_in(cwd / "runs/run/checkpoints"):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)


def goes_on(cwd: Path, stage: int, ranks: int, store: str) -> dict[int, float]:
    """The losses of the run in `cwd` from its last checkpoint on."""
    where = {"MLFLOW_TRACKING_URI": f"sqlite:///{cwd}/{store}"}
    other = [*recorded(cwd, store), f"deepspeed=deepspeed/zero{stage}.json"]
    done = launch("--resume", "runs/run", *other, cwd=cwd, ranks=ranks, env=where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "converting it to any" in done.stdout + done.stderr
    return losses(cwd, store)


def same(resumed: dict[int, float], whole: dict[int, float], steps: range) -> None:
    assert sorted(resumed) == list(steps)
    assert [resumed[step] for step in steps] == pytest.approx([whole[step] for step in steps], rel=1e-4)


@pytest.mark.xdist_group("resume")
@pytest.mark.parametrize(("before", "after", "ranks"), [(1, 2, 4), (3, 3, 1), (2, 3, 1), (0, 3, 4)])
def test_a_run_goes_on_with_other_ranks_and_stage(
    before: int, after: int, ranks: int, twelve: Callable[[int], Path], tmp_path: Path
) -> None:
    """From two ranks to one or four, then back to two (so one to two is shown as well); from a stage to another."""
    shutil.copytree(twelve(before) / "runs", tmp_path / "runs")
    whole = losses(twelve(before))
    same(goes_on(tmp_path, after, ranks, "there.db"), whole, range(7, 13))
    weights, others = (load_file(cwd / "runs/run/best/model.safetensors") for cwd in (twelve(before), tmp_path))
    for name, value in weights.items():  # EMCL's state, a buffer, and the frozen tower among them
        if not name.endswith("in_proj_bias"):  # its gradient is rounding alone
            assert (value - others[name]).norm() <= 1e-3 * value.norm().clamp_min(1e-6), name
    forget_after(tmp_path, 9)
    same(goes_on(tmp_path, before, 2, "back.db"), whole, range(10, 13))


@pytest.fixture(scope="module")
def run(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its last three checkpoints."""
    cwd = tmp_path_factory.mktemp("checkpoints")
    done = launch("--task", "retrieval", *settings(sample_shards, 1), "checkpoint.keep=3", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd / "runs/run"


@pytest.mark.xdist_group("resume")
def test_what_cannot_go_on_is_named(run: Path, tmp_path: Path) -> None:
    """Without ZeRO, bf16 keeps its optimiser's state in a form of its own."""
    shutil.copytree(run.parent, tmp_path / "runs")
    done = launch("--resume", "runs/run", "deepspeed=deepspeed/zero0.json", "precision=bf16", cwd=tmp_path)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "is of ZeRO stage 1; stage 0 goes on from it in fp32 alone" in output and "Traceback" not in output


@pytest.mark.xdist_group("resume")
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    saved = checkpoints_in(folder)
    assert len(saved) == 3
    assert checkpoint.newest_whole(folder) == saved[-1]
    said: list[str] = []
    victim = max(saved[-1].rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (saved[-2] / MANIFEST).write_text("{")
    assert checkpoint.newest_whole(folder, said.append) == saved[-3]
    assert victim.name in said[0] and saved[-2].name in said[1]
    next(saved[-3].rglob("*.pt")).unlink()
    with pytest.raises(UserError, match="no whole checkpoint"):
        checkpoint.newest_whole(folder, said.append)


@pytest.mark.xdist_group("resume")
def test_a_checkpoint_cut_short_is_none(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(run / "checkpoints", folder)
    newest = checkpoints_in(folder)[-1]
    newest.rename(newest.with_name(f"{newest.name}{PART}"))
    assert checkpoint.newest_whole(folder) == checkpoints_in(folder)[-1] != newest


@pytest.mark.xdist_group("resume")
def test_a_full_disk_is_an_error_that_says_how_much_and_leaves_the_old_ones(
    sample_shards: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "small"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(disk)]).returncode:
        pytest.skip("no small disk can be mounted here")
    try:
        limits = [*settings(sample_shards, 1), f"runs={disk}/runs", "checkpoint.keep=50", "checkpoint.every_steps=2"]
        done = launch("--task", "retrieval", *limits, cwd=tmp_path)
        assert done.returncode != 0
        output = done.stdout + done.stderr
        assert re.search(r"error: step-\d+ could not be saved .* needs [\d,]+ MiB, [\d,]+ are free; step-\d+", output)
        assert "Traceback" not in output
        folder = disk / "runs/run/checkpoints"
        assert checkpoint.newest_whole(folder) == checkpoints_in(folder)[-1]
        assert not list(folder.glob(f"*{PART}"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.xdist_group("resume")
def test_a_signal_saves_ends_with_75_and_the_run_goes_on(sample_shards: Path, tmp_path: Path) -> None:
    arguments = ["--task", "retrieval", *settings(sample_shards, 1), *recorded(tmp_path)]
    command, environment = deepspeed_command(*arguments, ranks=2)
    shell = ["bash", "-c", 'trap "" USR1; exec "$@"', "bash", *command]  # as cluster/slurm/train.sbatch does
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            shell, cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while f"5/{STEPS} [" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=120) == 75, log.read_text()[-3000:]
    said = re.search(r"stopped: saved at step (\d+) of 40; go on by --resume runs/run", log.read_text())
    assert said is not None and 5 <= int(said[1]) < STEPS
    done = launch("--resume", "runs/run", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(losses(tmp_path)) == list(range(1, STEPS + 1))


@pytest.mark.xdist_group("resume")
def test_a_second_run_with_the_same_folder_is_refused(sample_shards: Path, tmp_path: Path) -> None:
    held = RunFolder.create(tmp_path / "runs", "run", ["retrieval"])
    done = launch("--task", "retrieval", *settings(sample_shards, 1), cwd=tmp_path, ranks=2)
    assert done.returncode != 0
    assert f"runs/run is in use by process {os.getpid()} on" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    held.release()
    RunFolder.create(tmp_path / "runs", "run", ["retrieval"]).release()
