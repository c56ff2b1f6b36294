"""A checkpoint for other ranks or another ZeRO stage, through DeepSpeed's universal form.

DeepSpeed's converter writes each weight and its two moments by themselves, `zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`.
Beyond that its loaders want files named and labelled as their own stage would have, know nothing of buffers and frozen
weights, and nothing at all of stage 0. That is made up for here. All of it runs on one rank, a weight at a time but for
stage 0, which holds all of them anyway.
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


def to_universal(path: Path, place: Path, names: list[list[str]], before: int, after: int) -> None:
    """Converts `path`, of ZeRO stage `before`, to `place`, which any number of ranks at stage `after` can read.

    Args:
        names: of the learning weights, by group of the optimiser.

    Raises:
        UserError: DeepSpeed's converter fails; its last line.
    """
    part = place.with_name(f"{place.name}{PART}")
    shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(place, ignore_errors=True)
    model = _load(path / (SHARDED.format(0) if before == 3 else PLAIN))
    if before == 0:
        _split(model, part, names)
    else:
        _convert(path, part)
    kept = {**load_file(path / KEPT), **_frozen(path, model, names, before)}
    for file in part.glob("*_model_states.pt"):
        file.unlink()
    optimizer = _optimizer(part, model, before)
    shapes = _shapes(model, names)
    facts = {key: value for key, value in model.items() if key not in ("module", "optimizer", "frozen_param_fragments")}
    if after == 0:
        torch.save({**facts, **_joined(part, names, shapes, kept, optimizer)}, part / PLAIN)
        shutil.rmtree(part / "zero")
    else:
        torch.save({**facts, "module": {}, "optimizer": None}, part / (SHARDED.format(0) if after == 3 else PLAIN))
        _label(part, shapes, optimizer)
    save_file(kept, part / KEPT)
    part.rename(place)


def _load(file: Path) -> Any:
    return torch.load(file, map_location="cpu", weights_only=False)  # a run's own, see docs/operations.md


def _convert(path: Path, part: Path) -> None:
    """In a process of its own: DeepSpeed's converter has a pool of processes and much to say."""
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(path),
        "--output_folder", str(part), "--inject_missing_state",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{path} cannot be converted for other ranks: {done.stderr.strip().splitlines()[-1]}")
    (path.parent / "latest_universal").unlink(missing_ok=True)  # its note, which nothing here reads


def _split(model: dict[str, Any], part: Path, names: list[list[str]]) -> None:
    """What DeepSpeed's converter would have made of a checkpoint without ZeRO."""
    state = model["optimizer"]["state"]
    for number, name in enumerate(name for group in names for name in group):
        folder = part / "zero" / name
        folder.mkdir(parents=True)
        torch.save(model["module"][name].clone(), folder / "fp32.pt")
        for key in MOMENTS:
            torch.save(state[number][key].clone(), folder / f"{key}.pt")


def _optimizer(part: Path, model: dict[str, Any], before: int) -> dict[str, Any]:
    """The settings of the optimiser's groups, its step, which is one for all weights, and the state of a loss scale."""
    if before == 0:
        optimizer = model["optimizer"]
        return {"param_groups": optimizer["param_groups"], "step": optimizer["state"][0]["step"]}
    facts = _load(part / "zero" / "optimizer_state.pt")
    if before == 3:
        step = facts["optimizer_state_dict"]["state"][0]["step"]
    else:
        step = _load(next((part / "zero").glob("*/step.pt")))
    scale = {key: facts[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow") if key in facts}
    return {**scale, "param_groups": facts["param_groups"], "step": step}


def _shapes(model: dict[str, Any], names: list[list[str]]) -> dict[str, torch.Size]:
    if model["param_shapes"] is None:
        return {name: model["module"][name].shape for group in names for name in group}
    return {name: shape for group in model["param_shapes"] for name, shape in group.items()}


def _label(part: Path, shapes: dict[str, torch.Size], optimizer: dict[str, Any]) -> None:
    """As loaders of stages 1 to 3 want it: whole shapes, a step a weight, facts of the optimiser for either."""
    import deepspeed

    for name, shape in shapes.items():
        folder = part / "zero" / name
        for key in ("fp32", *MOMENTS):
            torch.save({"param": _tensor(folder / f"{key}.pt").view(shape), "cat_dim": 0}, folder / f"{key}.pt")
        torch.save(optimizer["step"], folder / "step.pt")
    inner = {"state": {0: {"step": optimizer["step"]}}, "param_groups": optimizer["param_groups"]}
    facts = {**optimizer, "ds_version": deepspeed.__version__, "optimizer_state_dict": inner}
    torch.save(facts, part / "zero" / "optimizer_state.pt")


def _tensor(file: Path) -> Tensor:
    found = _load(file)
    tensor: Tensor = found["param"] if isinstance(found, dict) else found
    return tensor.detach()


def _frozen(path: Path, model: dict[str, Any], names: list[list[str]], before: int) -> dict[str, Tensor]:
    """Weights that do not learn, whole; at stage 3 each rank's file has a part of them."""
    learning = {name for group in names for name in group}
    if before < 3:
        others = model["module"].keys() - learning - set(model["buffer_names"])
        return {name: model["module"][name].clone() for name in others}
    files = sorted(path.glob(SHARDED.format("*")), key=lambda file: int(file.name.split("_")[3]))
    parts = [_load(file)["frozen_param_fragments"] for file in files]
    return {
        name: torch.cat([part[name].flatten() for part in parts])[: shape.numel()].view(shape).clone()
        for name, shape in model["frozen_param_shapes"].items()
    }


def _joined(
    part: Path,
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
            files = {key: part / "zero" / name / f"{key}.pt" for key in ("fp32", *MOMENTS)}
            found = {key: _tensor(file).view(shapes[name]) for key, file in files.items()}
            module[name] = found.pop("fp32")
            state[number] = {"step": optimizer["step"].clone(), **found}
    return {"module": module, "optimizer": {"state": state, "param_groups": groups}}
