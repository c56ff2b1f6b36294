"""The shipped job scripts on a real SLURM of two virtual nodes on this machine (tests/slurm/cluster.sh)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, losses, recorded, shared, short_run, small
from local_ranks import free_port

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("slurm")]
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"


class Slurm:
    """A place to submit from, with the repository's scripts."""

    def __init__(self, cwd: Path, environment: dict[str, str]) -> None:
        self.cwd, self.environment = cwd, environment

    def __call__(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.cwd, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def submit(self, *command: str, **environment: str) -> str:
        self.environment.update(environment)
        return re.sub(r"\D", "", self("sbatch", *command))

    def state(self, job: str) -> str:
        match = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        return match[1] if match else ""

    def wait(self, what: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)

    def logs(self) -> str:
        texts = [path.read_text(errors="replace")[-6000:] for path in sorted(self.cwd.glob("*.log"))]
        return "\n---\n".join(texts) + self("squeue")


def can_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if shutil.which("slurmctld") is None and can_install():
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "slurm-wlm", "munge"], capture_output=True)
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("no SLURM here, and it cannot be installed (root and apt-get are needed)")
    base = tmp_path_factory.mktemp("slurm")
    folder = base / "cluster"
    environment = {**os.environ, "BASE_PORT": str(free_port()), "SLURM_CONF": str(folder / "slurm.conf")}
    started = subprocess.run([CLUSTER, "start", folder], env=environment, capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip(f"SLURM does not start here: {(started.stdout + started.stderr)[-500:]}")
        cwd = base / "work"
        cwd.mkdir()
        for name in ("cluster", "platform"):
            (cwd / name).symlink_to(ROOT / name)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", RANKS="1")
        yield Slurm(cwd, environment)
    finally:
        subprocess.run([CLUSTER, "stop", folder], env=environment, check=True)


def checkpoints(slurm: Slurm, name: str) -> list[Path]:
    return sorted((slurm.cwd / "runs" / name / "checkpoints").glob("step-*/manifest.json"))


def test_two_nodes_survive_a_signal_a_requeue_and_a_lost_node(slurm: Slurm, sample_shards: Path) -> None:
    settings = [
        *small(sample_shards), "data.val=null", "optim.epochs=1000", "optim.max_steps=200", *recorded(slurm.cwd),
        "tracking.every_steps=5", "checkpoint.every_steps=20",
    ]  # fmt: skip
    job = slurm.submit("--nodes=2", "cluster/slurm/train.sbatch", "--task", "retrieval", *settings, RUN="mine")
    log = slurm.cwd / f"emcl-{job}.log"

    def lines(text: str) -> int:
        return log.read_text(errors="replace").count(text) if log.is_file() else 0

    # asked to leave, as before a time limit: it saves, ends with 75 and puts itself into the queue again
    slurm.wait(lambda: len(checkpoints(slurm, "mine")) > 0)
    assert lines("nnodes=2") == 2  # a launcher a node
    slurm("scancel", "--signal=USR1", job)
    slurm.wait(lambda: lines("stopped: saved at step") == 1)
    slurm.wait(lambda: lines("nnodes=2") == 4)
    # put back in its middle, without a warning
    saved = checkpoints(slurm, "mine")[-1]
    slurm.wait(lambda: checkpoints(slurm, "mine")[-1] > saved)
    slurm("scontrol", "requeue", job)
    slurm.wait(lambda: lines("nnodes=2") == 6)
    # a node that is taken down ends the job's processes, and the job goes on when it is back
    saved = checkpoints(slurm, "mine")[-1]
    slurm.wait(lambda: checkpoints(slurm, "mine")[-1] > saved)
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    slurm.wait(lambda: slurm.state(job) == "PENDING")
    resume = ["scontrol", "update", "nodename=n2", "state=resume"]
    subprocess.run(resume, env=slurm.environment, capture_output=True)  # unless it has come back by itself
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), 400)
    assert slurm.state(job) == "COMPLETED", slurm.logs()
    assert list(losses(slurm.cwd)) == list(range(5, 201, 5))  # one run, no step missing or twice
    assert json.loads((slurm.cwd / "runs/mine/scores-test.json").read_text())["samples"] == 12


def test_an_array_of_jobs_prepares_together(slurm: Slurm) -> None:
    videos = shared("data/videos")
    table = videos / "annotations.json"
    job = slurm.submit(
        "--array=1-3", "cluster/slurm/prepare.sbatch", "folder", "--videos", str(videos), "--annotations", str(table),
        "--out", "shards/clips", "--shard-size", "2", "--keep",
    )  # fmt: skip
    slurm.wait(lambda: slurm("squeue", "-h", "-j", job, "-t", "all", "-o", "%T").split() == ["COMPLETED"] * 3)
    index = json.loads((slurm.cwd / "shards/clips/index.json").read_text())
    assert len(index["shards"]) == 5
    whole = slurm.cwd / "whole"
    slurm("emcl", "prepare", "folder", "--videos", str(videos), "--annotations", str(table), "--out", str(whole),
          "--shard-size", "2", "--keep")  # fmt: skip
    for shard in whole.glob("*.tar"):
        assert shard.read_bytes() == (slurm.cwd / "shards/clips" / shard.name).read_bytes()


def test_a_job_scores_a_run_and_leaves_its_report(slurm: Slurm, sample_shards: Path) -> None:
    run = short_run(sample_shards, slurm.cwd).relative_to(slurm.cwd)
    test = f"data.test={sample_shards}/test-000000.tar"
    job = slurm.submit("--nodes=1", "cluster/slurm/evaluate.sbatch", str(run), test)
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"))
    assert slurm.state(job) == "COMPLETED", slurm.logs()
    assert json.loads((slurm.cwd / run / "scores-test.json").read_text())["samples"] == 12
    assert (slurm.cwd / run / "report/report.html").is_file()


SHOW = """
import json, os, sys
names = ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "WORLD_SIZE", "SLURM_CPUS_PER_TASK")
seen = {name: os.environ.get(name) for name in names} | {"arguments": sys.argv[1:]}
open(f"seen-{os.environ['SLURM_JOB_ID']}-{os.environ['RANK']}.json", "w").write(json.dumps(seen))
"""
JOB = """#!/bin/bash
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=2
#SBATCH --output=%x-%j.log
source cluster/slurm/common.sh
on_every_node show.py one "two words"
"""


@pytest.fixture
def ranks_seen(slurm: Slurm) -> Callable[..., tuple[str, list[dict[str, Any]]]]:
    """Runs a job whose ranks write down what they were started with; its state, and that by rank."""
    (slurm.cwd / "show.py").write_text(SHOW)
    (slurm.cwd / "show.sbatch").write_text(JOB)

    def run(*asked: str, ranks: str = "") -> tuple[str, list[dict[str, Any]]]:
        # the launcher takes this machine for one with GPUs; the ranks here need none
        environment = {**slurm.environment, "DS_ACCELERATOR": "cuda", "RANKS": ranks}
        job = Slurm(slurm.cwd, environment).submit("--parsable", *asked, "show.sbatch")
        slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"))
        return slurm.state(job), [json.loads(path.read_text()) for path in sorted(slurm.cwd.glob(f"seen-{job}-*.json"))]

    return run


def test_ranks_get_the_gpus_and_the_cores_that_the_job_was_given(slurm: Slurm, ranks_seen: Any) -> None:
    other = slurm.submit("--parsable", "--nodes=2", "--gpus-per-node=2", "--wrap", "sleep 300")
    slurm.wait(lambda: slurm.state(other) == "RUNNING")
    state, seen = ranks_seen("--nodes=2", "--gpus-per-node=2")  # the first two of each node are another job's
    slurm("scancel", other)
    assert state == "COMPLETED", slurm.logs()
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in seen] == ["2,3"] * 4
    assert [rank["LOCAL_RANK"] for rank in seen] == ["0", "1", "0", "1"]
    assert {rank["WORLD_SIZE"] for rank in seen} == {"4"}
    assert {rank["SLURM_CPUS_PER_TASK"] for rank in seen} == {"4"}  # of the launcher's step: two a GPU
    assert seen[0]["arguments"] == ["one", "two words"]


def test_names_of_gpus_are_passed_on_as_they_are(tmp_path: Path) -> None:
    """Of a scheduler that gives no numbers: GPU-... and MIG-... are names that the launcher cannot read."""
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "cluster").symlink_to(ROOT / "cluster")
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho localhost\n")
    (tmp_path / "scontrol").chmod(0o755)
    given = {"CUDA_VISIBLE_DEVICES": "GPU-8f2c,MIG-77aa", "DS_ACCELERATOR": "cuda", "RANKS": "2"}
    node = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODEID": "0"}
    met = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **given, **node, **met}
    environment["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", "cluster/slurm/launch_node.sh", "show.py"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    seen = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("seen-7-*.json"))]
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in seen] == ["GPU-8f2c,MIG-77aa"] * 2


def test_a_job_that_was_given_no_gpu_takes_none(slurm: Slurm, ranks_seen: Any) -> None:
    state, seen = ranks_seen("--nodes=1", ranks="2")
    assert state == "FAILED" and not seen
    assert "the job was given no GPU here" in slurm.logs()


def test_more_ranks_than_gpus_are_refused_by_name(slurm: Slurm, ranks_seen: Any) -> None:
    state, seen = ranks_seen("--nodes=1", "--gpus-per-node=2", ranks="3")
    assert state == "FAILED" and not seen
    assert "3 ranks, and the job was given 2 GPUs here (CUDA_VISIBLE_DEVICES=0,1)" in slurm.logs()


@pytest.mark.parametrize("script", ["train", "evaluate"])
def test_a_gpu_comes_with_cores_for_its_loaders(script: str, slurm: Slurm) -> None:
    job = slurm.submit("--parsable", "--hold", "--nodes=1", "--gpus-per-node=1", f"cluster/slurm/{script}.sbatch", "x")
    shown = slurm("scontrol", "show", "job", job)
    slurm("scancel", job)
    assert "CpusPerTres=gres:gpu:8" in shown
