"""Sample-set clips for the benchmarks that train or load; rendered once for all of `make bench`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

CLIPS = 512
GIVEN = "EMCL_BENCH_SAMPLE"
"""Environment variable in which bench.py passes their location."""
RENDER = """
import sys
from pathlib import Path
from emcl.prepare.sample_set import generate
generate(Path(sys.argv[1]), counts={"train": int(sys.argv[2]), "val": 0, "test": 0}, seed=0, progress=False)
"""


@contextmanager
def sample_clips() -> Iterator[str]:
    """Yields the pattern of the clips' shards."""
    if given := os.environ.get(GIVEN):
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        # in a separate process, because spawned render workers import all that their parent's main module imports
        subprocess.run([sys.executable, "-c", RENDER, folder, str(CLIPS)], check=True)
        yield f"{folder}/train-*.tar"


def settings(pattern: str) -> list[str]:
    """Settings of a run on only these clips."""
    return [f"data.train={pattern}", "data.val=null", "data.test=null", "data.generate=false"]
