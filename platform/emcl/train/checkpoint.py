"""A run's DeepSpeed checkpoints, `checkpoints/step-N`: the newest k are kept; resuming takes the newest intact one.

A checkpoint is written under a temporary name, with the size and checksum of every file, and renamed at the end. So one
that was cut short by a kill or a full disk never gets its name, and one that was damaged later is reported and skipped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import deepspeed
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emcl.config import Config
from emcl.disk import OLD, free_bytes, replace_folder
from emcl.distributed import Ranks
from emcl.errors import UserError, first_line
from emcl.inline_values import as_typed
from emcl.run_folder import MANIFEST, STEP, checkpoints_in
from emcl.train import reshard
from emcl.train.optimizer import optimizer_class
from emcl.train.reshard import KEPT, PART, UNIVERSAL, to_universal
from emcl.train.train_settings import OptimConfig

MIB = 2**20


def save(
    engine: Any,
    folder: Path,
    step: int,
    state: dict[str, Any],
    ranks: Ranks,
    *,
    names: list[list[str]],
    config: Config,
) -> None:
    """Saves a checkpoint, then deletes all but the newest `keep` up to its step, and later ones. Called by all ranks.

    Those of later steps must be damaged, since the run would have resumed from them otherwise.

    Args:
        names: names of the trained weights, by optimiser group.
        config: the run's settings, some of which must not change when it is resumed.

    Raises:
        UserError: it cannot be written; the earlier checkpoints are unchanged.
    """
    tag = f"{STEP}{step:08d}"
    temporary = folder / f"{tag}{PART}"
    error = None
    if ranks.first:
        shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while saving
        error = _no_room(engine, folder, tag)
    ranks.agree(error)
    try:
        engine.save_checkpoint(
            str(folder),
            tag=temporary.name,
            client_state={**state, "step": step},
            save_latest=False,
            exclude_frozen_parameters=False,
        )
    except (OSError, RuntimeError) as caught:  # torch.save raises the latter where the disk is full
        error = _not_written(folder, tag, _needed(engine, folder), first_line(caught))
        shutil.rmtree(temporary, ignore_errors=True)
    ranks.agree(error)
    if ranks.first:
        try:
            save_file(_buffers(engine), temporary / KEPT)
            begun = {"optim": _begun_with(config.optim), "precision": config.precision}
            facts = {"layout": _layout(engine, ranks), **begun, "groups": names}
            _finish(temporary, folder / tag, facts, config.checkpoint.keep)
        except (OSError, SafetensorError) as caught:
            error = _not_written(folder, tag, _needed(engine, folder), str(caught))
            shutil.rmtree(temporary, ignore_errors=True)
    ranks.agree(error)


def _buffers(engine: Any) -> dict[str, Tensor]:
    names = {name for name, _ in engine.module.named_buffers()}
    state = engine.module.state_dict()
    return {name: state[name].detach().cpu().contiguous() for name in names if name in state}


def _layout(engine: Any, ranks: Ranks) -> dict[str, int]:
    return {"ranks": ranks.world_size, "stage": engine.zero_optimization_stage()}


def _finish(temporary: Path, target: Path, facts: dict[str, Any], keep: int) -> None:
    (temporary / MANIFEST).write_text(json.dumps({**facts, "files": _facts(temporary)}, indent=1))
    replace_folder(temporary, target)
    standing = checkpoints_in(target.parent)
    number = standing.index(target) + 1
    # converted checkpoints were only needed to resume; unfinished ones are useless
    left = [path for path in target.parent.iterdir() if path.name.endswith((UNIVERSAL, PART, OLD))]
    for old in [*standing[: max(0, number - keep)], *standing[number:], *left]:
        try:
            shutil.rmtree(old)
        except OSError as error:  # the new checkpoint is complete nevertheless
            print(f"note: {old} could not be removed ({error.strerror})", flush=True)


def _needed(engine: Any, folder: Path) -> int:
    """Bytes of a checkpoint: the size of the last one; before the first, that of weights and Adam's two moments."""
    last = checkpoints_in(folder)
    if last:
        return sum(path.stat().st_size for path in last[-1].rglob("*") if path.is_file())
    return 12 * _count(engine)


def _count(engine: Any) -> int:
    """Number of weights, over all ranks."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in engine.module.parameters())


def check_room(engine: Any, folder: Path, ranks: Ranks) -> None:
    """Checks the disk space; called by all ranks before the first step.

    Raises:
        UserError: the disk has no room for a checkpoint and the best model.
    """
    model = 4 * _count(engine)
    ranks.agree(_no_room(engine, folder, "a checkpoint with a best model", model) if ranks.first else None)


def _no_room(engine: Any, folder: Path, tag: str, more: int = 0) -> UserError | None:
    """Checked before any rank writes: a rank that fails alone would leave the others waiting.

    `more`: further bytes that are needed.
    """
    need = _needed(engine, folder) + more
    return _not_written(folder, tag, need, "no room") if free_bytes(folder) < need else None


def _not_written(folder: Path, tag: str, need: int, reason: str) -> UserError:
    free, last = free_bytes(folder), checkpoints_in(folder)
    before = f"; {last[-1].name}, the one before, is whole" if last else ""
    return UserError(
        f"{tag} could not be saved in {folder} ({reason}): it needs {need / MIB:,.0f} MiB, "
        f"{free / MIB:,.0f} are free{before}"
    )


def damage(checkpoint: Path) -> str | None:
    """Describes what is damaged in a checkpoint; None if nothing is."""
    try:
        wanted = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is not readable"
    actual = _facts(checkpoint)
    return next((f"{name} is not as it was written" for name in wanted if actual.get(name) != wanted[name]), None)


def newest_whole(folder: Path, warn: Callable[[str], None] = print) -> Path:
    """The newest undamaged checkpoint; reports damaged ones by `warn`.

    Raises:
        UserError: there is none.
    """
    for path in reversed(checkpoints_in(folder)):
        wrong = damage(path)
        if wrong is None:
            return path
        warn(f"{path}: {wrong}; taking the one before")
    raise UserError(f"--resume: no whole checkpoint in {folder}; start the run without --resume")


@dataclass(frozen=True)
class FoundCheckpoint:
    """The checkpoint that a run resumes from."""

    path: Path
    stage: int
    """ZeRO's, of the run that goes on."""
    universal: bool
    """Whether it is DeepSpeed's universal form, which any number of ranks can read."""
    converted: bool


def find(folder: Path, ranks: Ranks, stage: int, config: Config) -> FoundCheckpoint:
    """The newest undamaged checkpoint, converted if the number of ranks or the ZeRO stage differs. Called by all ranks.

    Raises:
        UserError: there is none, it cannot be converted, or it was trained with another optimiser.
    """
    candidate, error = None, None
    if ranks.first:
        try:
            candidate = _fitting(newest_whole(folder), {"ranks": ranks.world_size, "stage": stage}, config)
        except UserError as wrong:
            error = wrong
    ranks.agree(error)
    chosen: FoundCheckpoint = ranks.gather_objects(candidate)[0]
    return chosen


def _fitting(path: Path, wanted: dict[str, int], config: Config) -> FoundCheckpoint:
    manifest = json.loads((path / MANIFEST).read_text())
    layout, precision, optimizer = manifest["layout"], config.precision, config.optim.optimizer
    before, after = layout["stage"], wanted["stage"]
    usual, now = _begun_with(OptimConfig()), _begun_with(config.optim)  # older checkpoints have no entry: defaults
    for name, before_it in {**usual, **manifest.get("optim", {})}.items():
        if now[name] != before_it:
            raise UserError(
                f"{path} was begun with optim.{name}={as_typed(before_it)} and does not go on with "
                f"{as_typed(now[name])}: --init takes the weights alone"
            )
    begun = manifest.get("precision", precision)
    if begun != precision and "clip_fp16" in (begun, precision):
        raise UserError(
            f"{path} was begun with precision={begun} and does not go on with {precision}: --init takes the weights "
            "alone"
        )
    if layout == wanted or (before, after) == (0, 0):  # without ZeRO every rank holds all
        return FoundCheckpoint(path, after, universal=False, converted=False)
    if 0 in (before, after) and precision != "fp32":
        raise UserError(
            f"{path} is of ZeRO stage {before}; stage {after} goes on from it in fp32 alone, not in {precision}: give "
            f"deepspeed=deepspeed/zero{before}.json (--init takes the weights alone)"
        )
    if not optimizer_class(config.optim).converts:
        raise UserError(
            f"{path}: with optim.optimizer={optimizer} it goes on with {layout['ranks']} ranks and "
            f"deepspeed=deepspeed/zero{before}.json alone (--init takes the weights alone)"
        )
    if "groups" not in manifest:
        same = f"{layout['ranks']} ranks and deepspeed=deepspeed/zero{before}.json"
        raise UserError(f"{path} was saved by an earlier version: it goes on with {same} alone")
    target = path.with_name(f"{path.name}{UNIVERSAL}")
    print(f"{path} is of {layout['ranks']} ranks, ZeRO {before}: converting it to any", flush=True)
    to_universal(path, target, manifest["groups"], before, after)
    return FoundCheckpoint(target, after, universal=after > 0, converted=True)


def restore_untrained(model: nn.Module, source: FoundCheckpoint, names: list[list[str]]) -> None:
    """Restores buffers and frozen weights of a model that is in no engine yet.

    Args:
        names: names of the trained weights, by optimiser group.

    Raises:
        UserError: the checkpoint is of another model.
    """
    path = source.path
    kept = load_file(path / KEPT) if source.converted else reshard.untrained(path, names, source.stage)
    try:
        model.load_state_dict(kept, strict=False)
    except RuntimeError as failed:
        raise _does_not_fit(path, failed) from None


def _does_not_fit(path: Path, failed: Exception) -> UserError:
    lines = [line.strip() for line in str(failed).splitlines() if line.strip() and not line.endswith(":")]
    first = shorten(next(iter(lines), type(failed).__name__), 200, placeholder=" ...")  # may list all weights
    return UserError(f"{path} does not fit this run (another model?): {first}")


def _begun_with(optim: OptimConfig) -> dict[str, Any]:
    """The settings on which the state of the optimiser and its schedule depends."""
    names = ("optimizer", "optimizer_options", "schedule", "decay", "logit_scale_lr")  # the last two: its groups
    return {name: getattr(optim, name) for name in names}


def load(engine: Any, source: FoundCheckpoint) -> dict[str, Any]:
    """Returns the client state, with `step`. Called by all ranks.

    Raises:
        UserError: the checkpoint is of another model.
    """
    groups = engine.optimizer.param_groups
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    try:
        loaded, state = engine.load_checkpoint(str(source.path.parent), tag=source.path.name)
    except Exception as failed:
        raise _does_not_fit(source.path, failed) from None
    if loaded is None:
        raise UserError(f"{source.path} could not be read; remove it to continue from the one before")
    if source.converted:
        _take_kept(engine, load_file(source.path / KEPT))
        # after conversion, ZeRO-3 gives every group the rate, decay and name of the first one
        rates = engine.lr_scheduler.get_last_lr()
        for group, own, rate in zip(engine.optimizer.param_groups, settings, rates, strict=True):
            group.update({**own, "lr": rate})
        # and all parameters share one step counter, which each would increment
        for kept in engine.basic_optimizer.state.values():
            if isinstance(kept.get("step"), Tensor):
                kept["step"] = kept["step"].clone()
    return state


def _take_kept(engine: Any, kept: dict[str, Tensor]) -> None:
    """Restores buffers and frozen weights, which the universal form lacks."""
    buffers = {name: kept[name] for name, _ in engine.module.named_buffers() if name in kept}
    engine.module.load_state_dict(buffers, strict=False)
    for name, parameter in engine.module.named_parameters():
        if name in kept:
            gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0)
            with gathered if hasattr(parameter, "ds_id") else nullcontext(), torch.no_grad():
                if parameter.numel():
                    parameter.copy_(kept[name])


def _facts(folder: Path) -> dict[str, list[Any]]:
    """Size and SHA-256 of each file besides the manifest."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor(8) as pool:
        return dict(zip((str(path.relative_to(folder)) for path in paths), pool.map(_fact, paths), strict=True))


def _fact(path: Path) -> list[Any]:
    with path.open("rb") as stream:
        return [path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest()]
