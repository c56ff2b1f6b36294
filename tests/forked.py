"""Python programs in processes forked from one that has imported what they need.

What a rank imports takes longer than most tests do; a forked one has it from the start. All else is as a new
interpreter would have it: environment, folder, arguments, `sys.path`, streams, exit status.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import forkserver, get_context, set_start_method
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import TimeoutExpired
from unittest import mock

import torch

from local_ranks import environments

FORKED = get_context("forkserver")
IMPORTED = [
    "emcl.train.run", "emcl.train.plan", "emcl.tasks.retrieval", "emcl.tasks.captioning", "emcl.tasks.msrvtt_qa",
    "emcl.serve.server", "emcl.search.index", "matplotlib.figure", "matplotlib.backends.backend_agg",
    # what DeepSpeed and MLflow import once a run starts
    "deepspeed.runtime.zero.muon.muon_optimizer", "setuptools", "mlflow.store.tracking.sqlalchemy_store", "git",
    "mlflow.system_metrics.system_metrics_monitor",
]  # fmt: skip
"""By the process that the others are forked from: Python has one thread there, and no device is touched."""
STACKS = signal.SIGUSR2
"""Has a program write all its threads' stacks to its standard error."""
AT_IMPORT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
"""Variables that libraries read when they are imported: a forked program cannot have others."""


@dataclass(frozen=True)
class _Start:
    """What a new interpreter would be told."""

    program: Path | str
    arguments: Sequence[str]
    env: Mapping[str, str]
    cwd: Path
    stdout: Path
    stderr: Path


class Program:
    """A script or module that runs, with `subprocess.Popen`'s names for what one asks it."""

    def __init__(self, start: _Start) -> None:
        start_server()
        self._process: ForkServerProcess = FORKED.Process(target=_become, args=(start,), name=str(start.program))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus a signal's number where that ended it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.returncode) is None:
            raise TimeoutExpired(self._process.name, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def say_stacks(self) -> None:
        """It and the processes it has forked, by `STACKS`."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, STACKS)

    def kill(self) -> None:
        self._process.kill()

    def kill_session(self) -> None:
        """It and the processes it has started."""
        with suppress(ProcessLookupError):  # it has no session yet
            os.killpg(self.pid, signal.SIGKILL)
        self.kill()


def start_program(
    program: Path | str, *arguments: str, env: Mapping[str, str], cwd: Path, stdout: Path, stderr: Path | None = None
) -> Program:
    """Starts a script (a path) or a module (a name) in a session of its own; what it says is added to the files.

    Errors go where the rest goes if `stderr` is not given. Of `env`, the variables of `AT_IMPORT` come too late.
    """
    return Program(_Start(program, arguments, dict(env), cwd, stdout, stderr or stdout))


def start_ranks(
    script: Path,
    arguments: Sequence[str],
    ranks: int,
    *,
    env: Mapping[str, str],
    cwd: Path,
    stdout: Path,
    stderr: Path | None = None,
) -> list[Program]:
    """A program a rank, as the `deepspeed` launcher would start them; it takes as long as they do."""
    return [
        start_program(
            script, *arguments, f"--local_rank={rank}", env={**env, **own}, cwd=cwd, stdout=stdout, stderr=stderr
        )
        for rank, own in enumerate(environments(ranks))
    ]


def start_server() -> None:
    """Where there is none yet in this process: it imports once, for all."""
    with mock.patch.dict(os.environ, AT_IMPORT):
        FORKED.set_forkserver_preload(IMPORTED)
        forkserver.ensure_running()


def _become(start: _Start) -> None:
    """Turns a forked process into the program, and ends it with that one's status."""
    os.setsid()
    os.environ.clear()
    os.environ.update(start.env)
    os.chdir(start.cwd)
    _say_into(start.stdout, start.stderr)
    faulthandler.register(STACKS, all_threads=True)
    set_start_method(None, force=True)  # else its own processes would be forked from the server, too
    torch.set_num_threads(int(start.env.get("OMP_NUM_THREADS", "1")))  # what PyTorch read on import was one
    sys.path[:], sys.argv[:] = _paths(start), [str(start.program), *start.arguments]
    code: object = None
    try:
        if isinstance(start.program, Path):
            runpy.run_path(str(start.program), run_name="__main__")
        else:
            runpy.run_module(start.program, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    # as an interpreter ends: threads first, then what libraries want done
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def _say_into(stdout: Path, stderr: Path) -> None:
    for descriptor, path in ((1, stdout), (2, stderr)):
        with path.open("ab") as out:
            os.dup2(out.fileno(), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def _paths(start: _Start) -> list[str]:
    """`sys.path` without the folders that pytest has added."""
    own = start.program.resolve().parent if isinstance(start.program, Path) else start.cwd
    given = [entry for entry in start.env.get("PYTHONPATH", "").split(os.pathsep) if entry]
    tests = Path(__file__).parent
    pytests = {str(tests), str(tests.parent), str(tests.parent / "benchmarks"), ""}
    return [str(own), *given, *(entry for entry in sys.path if entry not in pytests)]
