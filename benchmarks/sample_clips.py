"""Clips of the sample set for those benchmarks that train or load: rendered once for all of `make bench`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

CLIPS = 512
GIVEN = "EMCL_BENCH_SAMPLE"
"""Where bench.py says that they are."""
RENDER = """
import sys
from pathlib import Path
from emcl.prepare.sample import generate
generate(Path(sys.argv[1]), counts={"train": int(sys.argv[2]), "val": 0, "test": 0}, seed=0, progress=False)
"""


@contextmanager
def sample_clips() -> Iterator[str]:
    """The pattern of their shards."""
    if given := os.environ.get(GIVEN):
        yield given
        return
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own: those that render import again whatever the one that starts them has imported
        subprocess.run([sys.executable, "-c", RENDER, folder, str(CLIPS)], check=True)
        yield f"{folder}/train-*.tar"


def settings(pattern: str) -> list[str]:
    """Of a run on these clips alone."""
    return [f"data.train={pattern}", "data.val=null", "data.test=null", "data.generate=false"]
