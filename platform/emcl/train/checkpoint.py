"""DeepSpeed's checkpoints of a run: `checkpoints/step-N`, the newest k kept, the newest continued from."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from emcl.distributed import Ranks
from emcl.errors import UserError

PREFIX = "step-"
COMPLETE = "complete"
"""Written into a checkpoint last."""


def save(engine: Any, folder: Path, step: int, state: dict[str, Any], ranks: Ranks, keep: int) -> None:
    """Called by all ranks. Older checkpoints than the newest `keep` are removed."""
    tag = f"{PREFIX}{step:08d}"
    engine.save_checkpoint(str(folder), tag=tag, client_state={**state, "step": step}, exclude_frozen_parameters=False)
    ranks.barrier()
    if ranks.first:
        (folder / tag / COMPLETE).touch()
        for old in checkpoints(folder)[: -max(1, keep)]:
            shutil.rmtree(old)
    ranks.barrier()


def checkpoints(folder: Path) -> list[Path]:
    """The complete ones, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted(path for path in found if (path / COMPLETE).is_file())


def resume(engine: Any, folder: Path) -> dict[str, Any]:
    """Loads the newest complete checkpoint; returns its client state, with `step`.

    Raises:
        UserError: there is none, or it is of another model or number of ranks.
    """
    found = checkpoints(folder)
    if not found:
        raise UserError(f"--resume: no complete checkpoint in {folder}; start the run without --resume")
    try:
        loaded, state = engine.load_checkpoint(str(folder), tag=found[-1].name)
    except Exception as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{found[-1]} does not fit this run (another model, or number of ranks): {first}") from None
    if loaded is None:
        raise UserError(f"{found[-1]} could not be read; remove it to continue from the one before")
    return state
