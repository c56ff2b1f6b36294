"""Fixtures: where the real data lies, small shards rendered on the fly, and processes for distributed tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"

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


def launch(
    *arguments: str, cwd: Path, ranks: int = 1, env: dict[str, str] | None = None, timeout: int = 900
) -> subprocess.CompletedProcess[str]:
    """The user's own command: `deepspeed platform/launch.py ...`, in `cwd`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [
        "deepspeed", "--master_port", str(free_port()), "--num_accelerators", str(ranks),
        str(ROOT / "platform" / "launch.py"), *arguments,
    ]  # fmt: skip
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout)


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
