"""What lies in a run's folder, and which run is meant; without PyTorch, so that an error comes at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from emcl.config import DEFAULT_RECIPE, Config, from_dict, resolve
from emcl.errors import UserError
from emcl.recipe import read_yaml
from emcl.registry import expand, settings_of
from emcl.settings import Tree

WEIGHTS, CONFIG = "model.safetensors", "config.yaml"
CHECKPOINTS = "checkpoints"
PREFIX = "step-"
MANIFEST = "manifest.json"
"""How many ranks and which ZeRO stage wrote a checkpoint, the optimiser's groups; size and checksum of every other
file."""


def find_export(path: Path) -> Path:
    """The export directory at `path`: itself, or the best one of a run directory.

    Raises:
        UserError: there is none.
    """
    for candidate in (path, path / "best"):
        if (candidate / WEIGHTS).is_file() and (candidate / CONFIG).is_file():
            return candidate
    if not path.exists():
        raise UserError(f"{path}: no such directory (give a run's folder, such as runs/NAME, or an export in it)")
    raise UserError(f"{path} holds no export ({WEIGHTS} and {CONFIG}); give a run's folder, such as runs/NAME")


def find_run(resume: str) -> Path:
    """The run to resume: this folder, or for `auto` the one with the newest checkpoint in runs/.

    Raises:
        UserError: there is none.
    """
    if resume != "auto":
        folder = Path(resume)
        if not (folder / CONFIG).is_file():
            raise UserError(f"--resume {resume}: no run's folder (it would hold {CONFIG} and {CHECKPOINTS}/)")
        return folder
    found = [path.parent for path in Path("runs").glob(f"*/{CONFIG}") if checkpoints(path.parent / CHECKPOINTS)]
    if not found:
        raise UserError("--resume: no run with a complete checkpoint in runs/; start one without --resume")
    return max(found, key=lambda path: checkpoints(path / CHECKPOINTS)[-1].stat().st_mtime)


def checkpoints(folder: Path) -> list[Path]:
    """Those that were finished, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+", path.name)]
    return sorted(path for path in found if (path / MANIFEST).is_file())


def saved_config(folder: Path) -> Config:
    """What a run or export was configured with.

    Raises:
        UserError: its file is wrong.
    """
    return from_dict([_saved(folder)], source=str(folder / CONFIG))


def _saved(folder: Path) -> Tree:
    saved = read_yaml(folder / CONFIG)
    if isinstance(saved.get("name"), str):
        saved["name"] = saved["name"].rpartition("/")[2]  # earlier versions took `a/b`
    return saved


def config_of_run(
    tasks: Sequence[str] | None,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    evaluate: Path | None,
    resumed: Path | None,
    kind_of: Callable[[str], Any] = settings_of,
) -> Config:
    """From the recipe; or, to evaluate or resume, from what the run itself was configured with.

    Raises:
        UserError: something in it is wrong, or the run was not trained for one of `tasks`.
    """
    earlier = evaluate or resumed
    if recipe is not None or earlier is None:
        return resolve(tasks, recipe or DEFAULT_RECIPE, overrides, kind_of=kind_of)
    folder = find_export(evaluate) if evaluate else earlier
    saved = _saved(folder)
    trained = list(saved.get("tasks", ()))
    missing = [name for name in expand(tasks or []) if name not in trained]
    if missing:
        raise UserError(f"{earlier} was not trained for {missing[0]} (its tasks: {', '.join(trained)})")
    return from_dict([saved], overrides=overrides, source=str(folder / CONFIG), kind_of=kind_of)
