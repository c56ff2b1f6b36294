"""Finds the run that is meant, and the settings to train or score it; without PyTorch, so that errors come at once."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from emcl.config import DEFAULT_RECIPE, Config, from_dict, resolve
from emcl.errors import UserError, said_of
from emcl.kinds import Kinds, kinds_in
from emcl.recipe import filled_in, parse_overrides
from emcl.registry import EVERY_TASK, settings_of
from emcl.run_folder import CONFIG, RUNS, RunFolder, saved_settings, tasks_in
from emcl.settings import Tree
from emcl.suggestions import nearest

AUTO = "auto"
"""In place of a run: the one that `name=` names, or the newest run of the given tasks."""


def find_run(resume: str, tasks: Sequence[str] | None = None, overrides: Sequence[str] = ()) -> RunFolder:
    """The run to resume: a folder, a name in `runs/`, or for `auto` the one with the newest checkpoint there.

    Raises:
        UserError: there is none, it has no checkpoint, or `overrides` name another run.
    """
    given = dict(parse_overrides(overrides))
    runs, name = Path(_typed(given, "runs") or RUNS), _typed(given, "name")
    if resume != AUTO:
        folder = RunFolder.around(Path(resume))
        if not folder.has_config() and (runs / resume).is_dir():
            folder = RunFolder.around(runs / resume)
    elif name:
        folder = RunFolder(runs / name)
    else:
        folder = _newest(runs, tasks, kinds_in([], list(given.items())))
    folder.check_resumable()
    if name and name not in (folder.name, folder.path.resolve().name):
        raise UserError(f"--resume {folder} goes on under its own name, not as name={name}")
    return folder


def _typed(given: Mapping[str, str], key: str) -> str:
    """A setting's text; empty where it is not given."""
    text = filled_in(key, given.get(key, ""))
    return "" if text == "null" else text


def _newest(runs: Path, tasks: Sequence[str] | None, kinds: Kinds) -> RunFolder:
    """The newest run of the given tasks, if any are given, and with these `kinds`."""
    saved = [(folder.whole_checkpoints(), folder) for folder in map(RunFolder, runs.glob("*")) if folder.has_config()]
    named = _named(tasks)
    by_age = sorted((_written(steps[-1]), folder.name, folder) for steps, folder in saved if steps)
    for *_, folder in reversed(by_age):
        trained = saved_settings(folder.path)
        if (not named or set(named) == set(tasks_in(trained))) and _agree(kinds, trained):
            return folder
    of_tasks = f" of {', '.join(named)}" if named else ""
    raise UserError(f"--resume: no run{of_tasks} with a whole checkpoint in {runs}/; start one without --resume")


def _agree(kinds: Kinds, saved: Tree) -> bool:
    """Whether a run has these `kinds` of tasks."""
    table = saved.get("kinds")  # not validated: another run's settings may be wrong
    of_run = table if isinstance(table, dict) else {}
    return all(of_run.get(name) == kind for name, kind in kinds.items())


def _written(checkpoint: Path) -> float:
    try:
        return checkpoint.stat().st_mtime
    except OSError:  # its run has just saved another and deleted this one
        return time.time()


def config_of_run(
    tasks: Sequence[str] | None,
    recipe: str | None,
    overrides: Sequence[str],
    *,
    evaluate: Path | None,
    resumed: RunFolder | None,
    kind_of: Callable[[str], Any] = settings_of,
) -> Config:
    """The configuration from the recipe; or, to evaluate or resume, from the run's own settings.

    A run is scored on the given tasks, by default on all of its own; it is resumed with all.

    Raises:
        UserError: something in it is wrong, or the run was not trained for one of `tasks`.
    """
    folder = resumed.path if resumed else RunFolder.open(evaluate).export if evaluate else None
    if folder is None:
        return resolve(tasks, recipe or DEFAULT_RECIPE, overrides, kind_of=kind_of)
    saved = saved_settings(folder)
    with said_of(str(folder / CONFIG)):
        kinds = kinds_in([saved])
    overrides = _without_kinds(overrides, kinds, f"{folder} has its tasks ({', '.join(tasks_in(saved))})")
    if evaluate and recipe is not None:
        other = resolve(tasks, recipe, overrides, kind_of=kind_of, kinds=kinds)
        return as_trained(other, from_dict([saved], source=str(folder / CONFIG), kind_of=kind_of))
    _check_tasks(_named(tasks), tasks_in(saved), evaluate=evaluate, resumed=resumed)
    if isinstance(saved.get("tracking"), dict):
        saved["tracking"].pop("profile", None)  # belongs to the call that asked for it
    scored = _named(tasks) or None if evaluate else None
    return from_dict([saved], scored, overrides=overrides, source=str(folder / CONFIG), kind_of=kind_of)


def as_trained(config: Config, earlier: Config) -> Config:
    """The settings, with what no shape of an earlier run's weights tells as it was there, unless it is given."""
    own = config.model
    model = dataclasses.replace(
        own,
        temporal_start=own.temporal_start or earlier.model.blocks_start(),
        quick_gelu=earlier.model.quick_gelu if own.quick_gelu is None else own.quick_gelu,
        tokenizer=own.tokenizer or earlier.model.tokenizer,
    )
    return with_frames_of(dataclasses.replace(config, model=model), earlier.model, earlier.data)


def with_frames_of(config: Config, model: Any, data: Any) -> Config:
    """The settings, with how towers want frames as `model` and `data` have it, where it is not given."""
    return dataclasses.replace(
        config,
        model=_filled(config.model, model, ("mean", "std")),
        data=_filled(config.data, data, ("resize_mode", "interpolation")),
    )


def _filled(settings: Any, known: Any, names: Sequence[str]) -> Any:
    values = {name: getattr(known, name) for name in names if getattr(settings, name) is None}
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return dataclasses.replace(settings, **lists)


def _without_kinds(overrides: Sequence[str], kinds: Kinds, run: str) -> list[str]:
    """Overrides without `kinds.*`, which a run has from its start; giving the same ones again is allowed.

    Raises:
        UserError: one differs from `kinds`; the message contains `run`.
    """
    given = parse_overrides(overrides)
    for name, kind in kinds_in([], given).items():
        if kind != kinds.get(name):
            raise UserError(f"kinds.{name}={kind} is for a new run: {run}")
    return [f"{key}={text}" for key, text in given if key.partition(".")[0] != "kinds"]


def _check_tasks(
    named: Sequence[str], trained: Sequence[str], *, evaluate: Path | None, resumed: RunFolder | None
) -> None:
    if resumed is not None and named and set(named) != set(trained):
        raise UserError(
            f"--resume {resumed} goes on with its own tasks ({', '.join(trained)}), not with {', '.join(named)}; "
            f"--init {resumed} starts from its weights"
        )
    unknown = next((name for name in named if name not in trained), None)
    if unknown is not None:
        meant = nearest(unknown, trained)
        raise UserError(f"{evaluate} was not trained for {unknown}{meant} (its tasks: {', '.join(trained)})")


def _named(tasks: Sequence[str] | None) -> list[str]:
    """The given tasks; none for `all`, as both mean all tasks of a run."""
    return [] if list(tasks or ()) == [EVERY_TASK] else list(tasks or ())
