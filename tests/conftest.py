"""Fixtures: where the real data lies, small shards rendered on the fly, and the launch command as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from local_ranks import free_port, start_ranks

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
LAUNCH = ROOT / "platform" / "launch.py"
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


def launch_environment(env: dict[str, str] | None = None) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})}
    return {**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}


def launch_command(
    *arguments: str, ranks: int = 1, env: dict[str, str] | None = None, script: Path = LAUNCH
) -> tuple[list[str], dict[str, str]]:
    """The user's own command, `deepspeed platform/launch.py ...`, and its environment."""
    command = [
        "deepspeed", "--master_port", str(free_port()), "--num_accelerators", str(ranks),
        str(script), *arguments,
    ]  # fmt: skip
    return command, launch_environment(env)


def launch(
    *arguments: str,
    cwd: Path,
    ranks: int = 1,
    env: dict[str, str] | None = None,
    timeout: int = 900,
    launcher: bool = False,
) -> subprocess.CompletedProcess[str]:
    """launch.py in `cwd` on so many CPU processes, with all that they say.

    With `launcher` by the user's own command. Where that is not what a test is about, the ranks are started with the
    variables that it would give them: it takes as long as they do.

    Raises:
        TimeoutExpired: they do not end; nor, once one has failed, do the others within a minute.
    """
    if launcher:
        command, environment = launch_command(*arguments, ranks=ranks, env=env)
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)
    command = [sys.executable, "-u", str(LAUNCH), *arguments]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as complained:
        processes = start_ranks(command, ranks, env=launch_environment(env), cwd=cwd, stdout=said, stderr=complained)
        ended = _all_end(processes, timeout)
        said.seek(0)
        complained.seek(0)
        if not ended:
            raise subprocess.TimeoutExpired(command, timeout, said.read(), complained.read())
        code = next((process.returncode for process in processes if process.returncode), 0)
        return subprocess.CompletedProcess(command, code, said.read(), complained.read())


def ends(process: psutil.Process, within: float = 20) -> bool:
    """Whether a process has ended, or does so soon: one that was killed takes the kernel a moment."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:  # its parent may yet bury it
                time.sleep(0.05)
                continue
        return True
    return False


def _all_end(processes: list[subprocess.Popen[bytes]], timeout: float) -> bool:
    """Whether all end by themselves, a minute after the first that fails; what has not is killed."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        if any(process.returncode for process in processes):
            deadline = min(deadline, time.monotonic() + 60)
        time.sleep(0.1)
    ended = all(process.poll() is not None for process in processes)
    for process in processes:
        process.kill()
        process.wait()
    return ended
