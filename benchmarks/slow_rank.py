"""launch.py with one rank slowed down.

SLOW_RANK selects the rank, SLOW_SECONDS the delay, SLOW_BY the place: `compute` at each forward pass, `disk` at each
video read, `clip` at every 20th decoded clip.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from emcl.tasks.retrieval import RetrievalTask

from emcl.data import loader
from emcl.data.shards import ShardSet

EVERY = {"compute": 1, "disk": 1, "clip": 20}


def slowed(call: Callable[..., Any], every: int, seconds: float) -> Callable[..., Any]:
    counts = itertools.count(1)

    def slow(*arguments: Any, **options: Any) -> Any:
        if next(counts) % every == 0:
            time.sleep(seconds)
        return call(*arguments, **options)

    return slow


kind, rank = os.environ.get("SLOW_BY"), os.environ.get("SLOW_RANK")
if kind and rank == os.environ["RANK"]:
    owner, name = {
        "compute": (RetrievalTask, "losses"), "disk": (ShardSet, "read"), "clip": (loader, "decode_as"),
    }[kind]  # fmt: skip
    setattr(owner, name, slowed(getattr(owner, name), EVERY[kind], float(os.environ["SLOW_SECONDS"])))

if __name__ == "__main__":
    from launch import main

    sys.exit(main())
