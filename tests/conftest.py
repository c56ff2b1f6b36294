"""Fixtures: where the real data lies, small shards rendered on the fly, runs and what MLflow knows of them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient, entities

from forked import Program, start_program, start_ranks, start_server
from local_ranks import free_port
from worked_examples import example_files

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
    from emcl.prepare.sample_set import generate

    start_server()  # it imports meanwhile
    folder = tmp_path_factory.mktemp("shards") / "sample"
    generate(folder, counts={"train": 24, "val": 8, "test": 12}, seed=1, shard_size=12, processes=1, progress=False)
    return folder


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The package of docs/extending.md and that of tests/third_party in a folder, and the environment that sees it."""
    examples, other = tmp_path_factory.mktemp("examples"), tmp_path_factory.mktemp("other")
    for name, content in example_files().items():
        (examples / name).write_text(content)
    for path in (ROOT / "tests" / "third_party").iterdir():
        if path.is_file():
            shutil.copy(path, other)
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--target", str(target), str(examples), str(other)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"PYTHONPATH": str(target)}


def small(shards: Path) -> list[str]:
    """Settings for a few steps of a tiny model on `sample_shards`, of which MLflow learns nothing."""
    return [
        "data.generate=false", f"data.train={shards}/train-*.tar", f"data.val={shards}/val-000000.tar",
        f"data.test={shards}/test-000000.tar", f"model.name={TINY}", "data.image_size=32", "data.frames=3",
        "data.max_tokens=16", "data.batch_size=8", "optim.epochs=2", "evaluate.every_epochs=1",
        "tracking.enabled=false",
    ]  # fmt: skip


@cache
def _empty_store() -> bytes:
    """An MLflow store with its tables and nothing in them, for which MLflow takes seconds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mlflow.db")
        MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
        return path.read_bytes()


def make_store(path: Path) -> None:
    path.write_bytes(_empty_store())


def recorded(cwd: Path, store: str = "mlflow.db") -> list[str]:
    """Settings of a run in `cwd` that MLflow is to know, each step of it; its store is made ready."""
    make_store(cwd / store)
    return ["tracking.enabled=true", "tracking.every_steps=1"]


def mlflow_run(cwd: Path, store: str = "mlflow.db") -> tuple[MlflowClient, entities.Run]:
    """The only run that the store of `cwd` knows."""
    client = MlflowClient(tracking_uri=f"sqlite:///{cwd}/{store}")
    (run,) = client.search_runs([client.get_experiment_by_name("sample").experiment_id])
    return client, run


def losses(cwd: Path, store: str = "mlflow.db") -> dict[int, float]:
    """By step, of the only MLflow run; each step once."""
    client, run = mlflow_run(cwd, store)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert len({metric.step for metric in history}) == len(history), "a step's loss was written twice"
    return {metric.step: metric.value for metric in history}


def short_run(shards: Path, folder: Path, *settings: str) -> Path:
    """A run of two steps of all tasks in `folder`; what it has learnt does not matter."""
    from emcl.train.run import run

    before = Path.cwd()
    os.chdir(folder)
    try:
        quick = ["optim.max_steps=2", "name=one", "data.val=null", "data.test=null", "emcl.variant=compact"]
        run(["retrieval", "captioning", "msrvtt_qa"], overrides=[*small(shards), *quick, "emcl.bases=8", *settings])
    finally:
        os.chdir(before)
    return folder / "runs" / "one"


def write_clips(shards: Path, folder: Path) -> None:
    """The twelve clips of the test split as files."""
    from emcl.data.shards import open_shards

    folder.mkdir(parents=True)
    clips = open_shards(f"{shards}/test-000000.tar")
    for row in clips.rows:
        (folder / f"{row.sample.id}.mp4").write_bytes(clips.read(row))


def launch_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})}
    return {**environment, "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}


Outcome = subprocess.CompletedProcess[str]


def launch(
    *arguments: str,
    cwd: Path,
    ranks: int = 1,
    env: Mapping[str, str] | None = None,
    script: Path = LAUNCH,
    timeout: int = 900,
) -> Outcome:
    """launch.py in `cwd` on so many CPU processes, with all that they say. The ranks start without the launcher.

    The test fails if they do not end in `timeout` seconds, or, once one has failed, the others in a minute.
    """
    environment = launch_environment(env)

    def start(stdout: Path, stderr: Path) -> list[Program]:
        return start_ranks(script, arguments, ranks, env=environment, cwd=cwd, stdout=stdout, stderr=stderr)

    return _outcome(start, arguments, timeout)


def run_program(
    program: Path | str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: int = 600
) -> Outcome:
    """A script (a path) or a module (a name) in a process of its own."""
    environment = launch_environment(env)

    def start(stdout: Path, stderr: Path) -> list[Program]:
        return [start_program(program, *arguments, env=environment, cwd=cwd, stdout=stdout, stderr=stderr)]

    return _outcome(start, arguments, timeout)


def emcl_command(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Outcome:
    """`emcl ...` in a process of its own."""
    return run_program("emcl.cli", *arguments, cwd=cwd, env=env)


def _outcome(start: Callable[[Path, Path], list[Program]], arguments: Sequence[str], timeout: int) -> Outcome:
    with tempfile.TemporaryDirectory() as logs:
        stdout, stderr = Path(logs, "stdout"), Path(logs, "stderr")
        programs = start(stdout, stderr)
        ended = _all_end(programs, timeout)
        said, complained = (path.read_text(errors="replace") for path in (stdout, stderr))
    if not ended:
        pytest.fail(f"it did not end: {said}{complained}")
    code = next((program.returncode for program in programs if program.returncode), 0)
    return Outcome(list(arguments), code, said, complained)


def _all_end(programs: list[Program], timeout: float) -> bool:
    """Whether all end by themselves, a minute after the first that fails.

    Those that do not say where they are (their stacks), and are killed.
    """
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline and any(program.poll() is None for program in programs):
        if any(program.returncode for program in programs):
            deadline = min(deadline, time.monotonic() + 60)
        time.sleep(0.05)
    if not (ended := all(program.poll() is not None for program in programs)):
        for program in programs:
            program.say_stacks()
        time.sleep(2)
    for program in programs:
        program.kill_session()
        program.wait()
    return ended


def deepspeed_command(
    *arguments: str, ranks: int = 1, env: Mapping[str, str] | None = None, script: Path = LAUNCH
) -> tuple[list[str], dict[str, str]]:
    """The user's own command, `deepspeed platform/launch.py ...`, and its environment."""
    chosen = ["--master_port", str(free_port()), "--num_accelerators", str(ranks)]
    return ["deepspeed", *chosen, str(script), *arguments], launch_environment(env)


def deepspeed(*arguments: str, cwd: Path, ranks: int, env: Mapping[str, str] | None = None) -> Outcome:
    """As `launch`, by the user's own command; it takes several times as long."""
    command, environment = deepspeed_command(*arguments, ranks=ranks, env=env)
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=900)


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
