"""Fixtures: where the real data lies, small shards rendered on the fly, and the launch command as a user types it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
TINY = str(ROOT / "tests" / "tiny_clip.json")
"""A model of some thousand weights, besides its vocabulary."""

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may wait for a model hub


def shared(relative: str) -> Path:
    """A file of shared/, or the test is skipped and says so."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture(scope="session")
def sample_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small sample set: 24 / 8 / 12 clips."""
    from emcl.prepare.sample import generate

    folder = tmp_path_factory.mktemp("shards") / "sample"
    generate(folder, counts={"train": 24, "val": 8, "test": 12}, seed=1, shard_size=12, processes=1, progress=False)
    return folder


def small(shards: Path) -> list[str]:
    """Settings for a few steps of a tiny model on `sample_shards`."""
    return [
        "data.generate=false", f"data.train={shards}/train-*.tar", f"data.val={shards}/val-000000.tar",
        f"data.test={shards}/test-000000.tar", f"model.name={TINY}", "data.size=32", "data.frames=3", "data.words=16",
        "data.batch_size=8", "optim.epochs=2", "evaluate.every_epochs=1",
    ]  # fmt: skip


def short_run(shards: Path, folder: Path, *settings: str) -> Path:
    """A run of two steps of all tasks in `folder`; what it has learnt does not matter."""
    from emcl.train.run import run

    before = Path.cwd()
    os.chdir(folder)
    try:
        quick = ["optim.max_steps=2", "tracking.enabled=false", "name=one", "data.test=null", "emcl.variant=compact"]
        run(["retrieval", "captioning", "msrvtt_qa"], overrides=[*small(shards), *quick, "emcl.k=8", *settings])
    finally:
        os.chdir(before)
    return folder / "runs" / "one"


def write_clips(shards: Path, folder: Path) -> None:
    """The twelve clips of the test split as files."""
    from emcl.data.shards import open_shards

    folder.mkdir(parents=True)
    found = open_shards(f"{shards}/test-000000.tar")
    for row in found.rows:
        (folder / f"{row.sample.id}.mp4").write_bytes(found.read(row))


def launch_command(
    *arguments: str, ranks: int = 1, env: dict[str, str] | None = None, script: Path = ROOT / "platform" / "launch.py"
) -> tuple[list[str], dict[str, str]]:
    """The command and its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [
        "deepspeed", "--master_port", str(free_port()), "--num_accelerators", str(ranks),
        str(script), *arguments,
    ]  # fmt: skip
    return command, environment


def launch(
    *arguments: str,
    cwd: Path,
    ranks: int = 1,
    env: dict[str, str] | None = None,
    timeout: int = 900,
    launcher: bool = False,
) -> subprocess.CompletedProcess[str]:
    """launch.py in `cwd` on so many CPU processes, with all that they say.

    With `launcher` by the user's own command, `deepspeed platform/launch.py ...`. Where that is not what a test is
    about, the ranks are started with the variables that the launcher would give them: it takes as long as they do.
    """
    command, environment = launch_command(*arguments, ranks=ranks, env=env)
    if launcher:
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    script = command.index(str(ROOT / "platform" / "launch.py"))
    shared_by_all = {"WORLD_SIZE": ranks, "LOCAL_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        processes = []
        for rank in range(ranks):
            own = {name: str(value) for name, value in (shared_by_all | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            started = [sys.executable, "-u", *command[script:], f"--local_rank={rank}"]
            processes.append(subprocess.Popen(started, cwd=cwd, env=environment | own, stdout=said, stderr=complained))
        codes = _all_ended(processes, timeout)
        said.seek(0)
        complained.seek(0)
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(command, code, said.read(), complained.read())


def _all_ended(processes: list[subprocess.Popen[bytes]], timeout: float) -> list[int]:
    """Exit codes; once one has failed the others get a minute, as they must end by themselves."""
    deadline = time.monotonic() + timeout
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + 60)
        time.sleep(0.1)
    for process in processes:
        process.kill()
    return [process.wait() for process in processes]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
