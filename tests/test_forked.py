"""A forked program finds what a new interpreter would have given it, and ends as one would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import launch_environment, run_program

SHOW = """
import json, multiprocessing, os, sys, threading
seen = {
    "name": __name__, "file": __file__, "arguments": sys.argv, "first": sys.path[0], "cwd": os.getcwd(),
    "environment": sorted(os.environ), "threads": threading.active_count(), "main": sys.modules["__main__"].__file__,
    "start": multiprocessing.get_start_method(), "paths": [path for path in sys.path if "tests" in path],
}
print(json.dumps(seen))
print("to the other stream", file=sys.stderr)
"""


def test_it_sees_what_a_new_interpreter_shows(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    environment = {"OPENBLAS_NUM_THREADS": "1", "MINE": "yes", "PYTHONPATH": str(tmp_path / "packages")}
    forked = run_program(script, "a", "b c", cwd=tmp_path, env=environment)
    command = [sys.executable, str(script), "a", "b c"]
    fresh = subprocess.run(
        command, cwd=tmp_path, env=launch_environment(environment), capture_output=True, text=True, check=True
    )
    assert json.loads(forked.stdout) == json.loads(fresh.stdout)
    assert forked.stderr == fresh.stderr == "to the other stream\n"


@pytest.mark.parametrize("threads", ["1", "2"])
def test_it_computes_on_as_many_threads_as_it_is_told(threads: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("import torch; print(torch.get_num_threads())")
    done = run_program(tmp_path / "program.py", cwd=tmp_path, env={"OMP_NUM_THREADS": threads})
    assert done.stdout == f"{threads}\n"


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why"),
        ("raise ValueError('what')", 1, "ValueError: what"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -9, ""),
        ("import atexit, sys; atexit.register(sys.stderr.write, 'at the end')", 0, "at the end"),
    ],
)
def test_it_ends_with_the_programs_status(line: str, code: int, said: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(line)
    done = run_program(tmp_path / "program.py", cwd=tmp_path)
    assert done.returncode == code and said in done.stderr
    assert bool(done.stderr) == bool(said)
