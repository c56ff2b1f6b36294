"""Converts a checkpoint for other ranks or another ZeRO stage, through DeepSpeed's universal form.

DeepSpeed's converter writes each weight and its two moments to separate files,
`zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`. But its loaders expect the file names and labels of their own stage, and they
support neither buffers, nor frozen weights, nor stage 0. This module adds what is missing. All of it runs on one rank,
one weight at a time except for stage 0, which holds all of them anyway.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from emcl.errors import UserError

UNIVERSAL, PART = ".universal", ".part"
KEPT = "buffers.safetensors"
"""In a checkpoint: buffers, EMCL's state among them. In the universal form, frozen weights too."""
MOMENTS = ("exp_avg", "exp_avg_sq")
PLAIN, SHARDED = "mp_rank_00_model_states.pt", "zero_pp_rank_{}_mp_rank_00_model_states.pt"
"""A checkpoint's model file below stage 3, and each rank's at stage 3."""


def to_universal(path: Path, target: Path, names: list[list[str]], before: int, after: int) -> None:
    """Converts `path`, of ZeRO stage `before`, to `target`, which any number of ranks at stage `after` can read.

    Args:
        names: names of the trained weights, by optimiser group.

    Raises:
        UserError: DeepSpeed's converter fails; the message has its last line.
    """
    temporary = target.with_name(f"{target.name}{PART}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(target, ignore_errors=True)
    model = _model(path, before)
    if before == 0:
        _split(model, temporary, names)
    else:
        _convert(path, temporary)
    kept = untrained(path, names, before, model)
    for file in temporary.glob("*_model_states.pt"):
        file.unlink()
    optimizer = _optimizer(temporary, model, before)
    shapes = _shapes(model, names)
    facts = {key: value for key, value in model.items() if key not in ("module", "optimizer", "frozen_param_fragments")}
    if after == 0:
        torch.save({**facts, **_joined(temporary, names, shapes, kept, optimizer)}, temporary / PLAIN)
        shutil.rmtree(temporary / "zero")
    else:
        torch.save({**facts, "module": {}, "optimizer": None}, temporary / (SHARDED.format(0) if after == 3 else PLAIN))
        _label(temporary, shapes, optimizer)
    save_file(kept, temporary / KEPT)
    temporary.rename(target)


def untrained(path: Path, names: list[list[str]], stage: int, model: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Buffers and frozen weights of a checkpoint of ZeRO stage `stage`, by name.

    Args:
        names: names of the trained weights, by optimiser group.
        model: its model file, if that has been read.
    """
    return {**load_file(path / KEPT), **_frozen(path, model or _model(path, stage), names, stage)}


def _model(path: Path, stage: int) -> dict[str, Any]:
    """A checkpoint's model file; at stage 3, the first rank's."""
    model: dict[str, Any] = _load(path / (SHARDED.format(0) if stage == 3 else PLAIN))
    return model


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False)  # written by the run, see docs/operations.md


def _convert(path: Path, universal: Path) -> None:
    """In a separate process: DeepSpeed's converter starts a process pool and prints a lot."""
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(path),
        "--output_folder", str(universal), "--inject_missing_state",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{path} cannot be converted for other ranks: {done.stderr.strip().splitlines()[-1]}")
    (path.parent / "latest_universal").unlink(missing_ok=True)  # the converter's file, not used here


def _split(model: dict[str, Any], universal: Path, names: list[list[str]]) -> None:
    """Writes what DeepSpeed's converter would write for a checkpoint without ZeRO."""
    state = model["optimizer"]["state"]
    for number, name in enumerate(name for group in names for name in group):
        folder = universal / "zero" / name
        folder.mkdir(parents=True)
        torch.save(model["module"][name].clone(), folder / "fp32.pt")
        for key in MOMENTS:
            torch.save(state[number][key].clone(), folder / f"{key}.pt")


def _optimizer(universal: Path, model: dict[str, Any], before: int) -> dict[str, Any]:
    """The settings of the optimiser's groups, its step (the same for all weights), and the state of a loss scale."""
    if before == 0:
        optimizer = model["optimizer"]
        return {"param_groups": optimizer["param_groups"], "step": optimizer["state"][0]["step"]}
    facts = _load(universal / "zero" / "optimizer_state.pt")
    if before == 3:
        step = facts["optimizer_state_dict"]["state"][0]["step"]
    else:
        step = _load(next((universal / "zero").glob("*/step.pt")))
    scale = {key: facts[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in facts}
    return {**scale, "param_groups": facts["param_groups"], "step": step}


def _shapes(model: dict[str, Any], names: list[list[str]]) -> dict[str, torch.Size]:
    if model["param_shapes"] is None:
        return {name: model["module"][name].shape for group in names for name in group}
    return {name: shape for group in model["param_shapes"] for name, shape in group.items()}


def _label(universal: Path, shapes: dict[str, torch.Size], optimizer: dict[str, Any]) -> None:
    """Writes what loaders of stages 1 to 3 expect: full shapes, a step for each weight, the optimiser's state."""
    import deepspeed

    for name, shape in shapes.items():
        folder = universal / "zero" / name
        for key in ("fp32", *MOMENTS):
            torch.save({"param": _tensor(folder / f"{key}.pt").view(shape), "cat_dim": 0}, folder / f"{key}.pt")
        torch.save(optimizer["step"], folder / "step.pt")
    inner = {"state": {0: {"step": optimizer["step"]}}, "param_groups": optimizer["param_groups"]}
    facts = {**optimizer, "ds_version": deepspeed.__version__, "optimizer_state_dict": inner}
    torch.save(facts, universal / "zero" / "optimizer_state.pt")


def _tensor(file: Path) -> Tensor:
    loaded = _load(file)
    tensor: Tensor = loaded["param"] if isinstance(loaded, dict) else loaded
    return tensor.detach()


def _frozen(path: Path, model: dict[str, Any], names: list[list[str]], before: int) -> dict[str, Tensor]:
    """Frozen weights in full; at stage 3 each rank's file has a fragment of them."""
    learning = {name for group in names for name in group}
    if before < 3:
        others = model["module"].keys() - learning - set(model["buffer_names"])
        return {name: model["module"][name].clone() for name in others}
    files = sorted(path.glob(SHARDED.format("*")), key=lambda file: int(file.name.split("_")[3]))
    of_ranks = [_load(file)["frozen_param_fragments"] for file in files]
    return {
        name: torch.cat([fragments[name].flatten() for fragments in of_ranks])[: shape.numel()].view(shape).clone()
        for name, shape in model["frozen_param_shapes"].items()
    }


def _joined(
    universal: Path,
    names: list[list[str]],
    shapes: dict[str, torch.Size],
    kept: dict[str, Tensor],
    optimizer: dict[str, Any],
) -> dict[str, Any]:
    """The module's and the optimiser's state, as a checkpoint without ZeRO holds them."""
    module, groups = dict(kept), []
    state: dict[int, dict[str, Tensor]] = {}
    for settings, group in zip(optimizer["param_groups"], names, strict=True):
        numbers = range(len(state), len(state) + len(group))
        groups.append({**settings, "params": list(numbers)})
        for number, name in zip(numbers, group, strict=True):
            files = {key: universal / "zero" / name / f"{key}.pt" for key in ("fp32", *MOMENTS)}
            tensors = {key: _tensor(file).view(shapes[name]) for key, file in files.items()}
            module[name] = tensors.pop("fp32")
            state[number] = {"step": optimizer["step"].clone(), **tensors}
    return {"module": module, "optimizer": {"state": state, "param_groups": groups}}
