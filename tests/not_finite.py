"""The launch command with a loss that is not a number on rank 1, at the steps that BAD_STEPS names."""

from __future__ import annotations

import os
import sys
from typing import Any

from emcl.tasks.retrieval import RetrievalTask

BAD = {int(step) for step in os.environ["BAD_STEPS"].split(",")}
taken = 0
losses = RetrievalTask.losses


def broken(self: Any, *arguments: Any) -> Any:
    global taken
    taken += 1
    own_losses = losses(self, *arguments)
    if taken in BAD and os.environ["RANK"] == "1":
        return {name: value * float("nan") for name, value in own_losses.items()}
    return own_losses


RetrievalTask.losses = broken  # type: ignore[method-assign]

if __name__ == "__main__":
    from launch import main

    sys.exit(main())
