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

import pytest

from conftest import ROOT, shared, small
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
        found = re.search(r"JobState=(\w+)", self("scontrol", "show", "job", job))
        return found[1] if found else ""

    def wait(self, what: Callable[[], bool], seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.3)

    def logs(self) -> str:
        found = [path.read_text(errors="replace")[-6000:] for path in sorted(self.cwd.glob("*.log"))]
        return "\n---\n".join(found) + self("squeue")


def can_install() -> bool:
    return os.geteuid() == 0 and shutil.which("apt-get") is not None


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    if shutil.which("slurmctld") is None and can_install():
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "slurm-wlm", "munge"], capture_output=True)
    if shutil.which("slurmctld") is None or os.geteuid() != 0:
        pytest.skip("no SLURM here, and it cannot be installed (root and apt-get are needed)")
    place = tmp_path_factory.mktemp("slurm")
    folder = place / "cluster"
    environment = {**os.environ, "BASE_PORT": str(free_port()), "SLURM_CONF": str(folder / "slurm.conf")}
    started = subprocess.run([CLUSTER, "start", folder], env=environment, capture_output=True, text=True)
    try:
        if started.returncode:
            pytest.skip(f"SLURM does not start here: {(started.stdout + started.stderr)[-500:]}")
        cwd = place / "work"
        cwd.mkdir()
        for name in ("cluster", "platform"):
            (cwd / name).symlink_to(ROOT / name)
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        environment.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1", RANKS="1")
        yield Slurm(cwd, environment)
    finally:
        subprocess.run([CLUSTER, "stop", folder], env=environment, check=True)


def steps_recorded(cwd: Path) -> list[int]:
    """Of the only MLflow run's loss."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{cwd}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("sample").experiment_id])
    assert len(runs) == 1
    return [metric.step for metric in client.get_metric_history(runs[0].info.run_id, "train/loss")]


def checkpoints(slurm: Slurm, name: str) -> list[Path]:
    return sorted((slurm.cwd / "runs" / name / "checkpoints").glob("step-*/manifest.json"))


def test_two_nodes_survive_a_signal_a_requeue_and_a_lost_node(slurm: Slurm, sample_shards: Path) -> None:
    settings = [
        *small(sample_shards), "data.val=null", "optim.epochs=1000", "optim.max_steps=200", "tracking.every_steps=5",
        "checkpoint.every_steps=20",
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
    assert steps_recorded(slurm.cwd) == list(range(5, 201, 5))  # one run, no step missing or twice
    assert json.loads((slurm.cwd / "runs/mine/scores-test.json").read_text())["samples"] == 12


def test_an_array_of_jobs_prepares_together_and_a_job_scores_the_run(slurm: Slurm) -> None:
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
    if (slurm.cwd / "runs/mine/best").is_dir():
        job = slurm.submit("--nodes=1", "cluster/slurm/evaluate.sbatch", "runs/mine")
        slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"))
        assert slurm.state(job) == "COMPLETED", slurm.logs()
        assert (slurm.cwd / "runs/mine/report/report.html").is_file()
