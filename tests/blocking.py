"""launch.py with a backend that says nothing of a rank that has gone: its collectives block for ever, as NCCL's do."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

COLLECTIVES = ("all_reduce", "all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "broadcast")
COLLECTIVES += ("reduce_scatter_tensor", "all_gather_object", "barrier", "reduce")


def never_failing(collective: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **how: Any) -> Any:
        try:
            return collective(*arguments, **how)
        except RuntimeError:
            threading.Event().wait()

    return call


for name in COLLECTIVES:
    if hasattr(dist, name):
        setattr(dist, name, never_failing(getattr(dist, name)))

if __name__ == "__main__":
    from launch import main

    sys.exit(main())
