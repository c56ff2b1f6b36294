"""The export directory: `model.safetensors`, `config.yaml`, `scores.json`; `emcl.load` opens it without DeepSpeed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from emcl.config import Config, to_yaml
from emcl.disk import replace_folder
from emcl.errors import UserError
from emcl.multitask import VideoLanguageModel
from emcl.run_folder import CONFIG, EXPORT_SCORES, WEIGHTS, saved_config, saved_settings, tasks_in


def save_export(folder: Path, state: dict[str, Tensor], config: Config, scores: dict[str, Any]) -> None:
    """Writes the directory under a temporary name and renames it, so that it is either complete or absent."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, temporary / WEIGHTS, metadata={"format": "pt"}
    )
    (temporary / CONFIG).write_text(to_yaml(config, secrets=False))
    (temporary / EXPORT_SCORES).write_text(json.dumps(scores, indent=1))
    replace_folder(temporary, folder)


def different_shape(name: str, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Describes the difference if a weight that both have differs in shape; else None."""
    if name not in weights or weights[name].shape == expected[name].shape:
        return None
    return f"{name} is {tuple(weights[name].shape)} there, {tuple(expected[name].shape)} here"


def load_weights(model: nn.Module, folder: Path, *, without: tuple[str, ...] = ()) -> None:
    """Loads `model` from an export, except weights whose names begin with one of `without`.

    Raises:
        UserError: the weights are of another architecture; names the first difference.
    """
    try:
        kept = load_file(folder / WEIGHTS)
    except FileNotFoundError:  # a training run has just replaced it by a better model
        raise UserError(f"{folder / WEIGHTS} has gone while it was opened: try again") from None
    state = {name: weight for name, weight in kept.items() if not name.startswith(without)}
    own = model.state_dict()
    for name in own:
        if name not in state:
            raise UserError(f"{folder} holds another architecture: it lacks {name} (use the configuration beside it)")
        if difference := different_shape(name, state, own):
            raise UserError(f"{folder} holds another architecture: {difference} (use the configuration beside it)")
    extra = next((name for name in state if name not in own), None)
    if extra is not None:
        raise UserError(
            f"{folder} holds another architecture: {extra} is unknown here (use the configuration beside it)"
        )
    model.load_state_dict(state)


def open_export(folder: Path, config: Config | None = None) -> tuple[VideoLanguageModel, Config]:
    """Builds the exported model (or what `config` makes of it) with its weights; nothing is downloaded.

    Heads of tasks that `config` lacks are not loaded; if there are any, nor are the learned loss weights.

    Raises:
        UserError: the weights are of another architecture, or are gone.
    """
    left: list[str] = []
    if config is None:
        config = saved_config(folder)
    else:
        left = [name for name in tasks_in(saved_settings(folder)) if name not in config.tasks]
    if left:
        config = dataclasses.replace(config, uncertainty_weights=False)
    model = VideoLanguageModel(config, load_weights=False)
    load_weights(model, folder, without=(*(f"tasks.{name}." for name in left), *(["uncertainty."] if left else [])))
    return model.eval(), config
