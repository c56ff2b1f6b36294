"""The registry is open: a package that somebody else installs adds a task, with no change here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, emcl_command, launch, small

pytestmark = pytest.mark.xdist_group("third party")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The package in a folder of its own, and the environment that sees it."""
    source = tmp_path_factory.mktemp("source")
    for path in (ROOT / "tests" / "third_party").iterdir():
        if path.is_file():
            shutil.copy(path, source)
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", str(target), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {"PYTHONPATH": str(target)}


def test_the_command_lists_it(installed: dict[str, str], tmp_path: Path) -> None:
    done = emcl_command("tasks", env=installed, cwd=tmp_path)
    assert "temporal_order" in done.stdout and "retrieval" in done.stdout


@pytest.mark.parametrize("tasks", ["temporal_order", "retrieval,temporal_order"])
def test_it_trains_and_is_scored_alone_and_beside_others(
    tasks: str, installed: dict[str, str], sample_shards: Path, tmp_path: Path
) -> None:
    settings = [*small(sample_shards), "optim.max_steps=3", "tasks.temporal_order.hidden=16", "name=run"]
    done = launch("--task", tasks, *settings, cwd=tmp_path, env=installed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "temporal_order on test" in done.stdout
    assert ("retrieval on test" in done.stdout) == ("retrieval" in tasks)
    assert "hidden: 16" in (tmp_path / "runs/run/best/config.yaml").read_text()
