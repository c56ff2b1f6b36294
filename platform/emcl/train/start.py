"""What training starts with: settings that the training split decides, and weights of an earlier run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from emcl.config import Config
from emcl.data.shards import ShardSet
from emcl.errors import UserError
from emcl.model.towers import wants_quick_gelu
from emcl.registry import task_class
from emcl.run_folder import WEIGHTS, saved_config
from emcl.train.export import different_shape


def learn_settings(config: Config, shards: ShardSet, init: Path | None = None) -> Config:
    """The configuration with every task's vocabulary and the like, found from the training samples and the weights.

    A task that `init` was trained for keeps what that run found: its weights are of that vocabulary.
    """
    earlier: dict[str, Any] = saved_config(init).tasks if init else {}
    samples = [row.sample for row in shards.rows]
    tasks = {}
    for name, settings in config.tasks.items():
        kind = task_class(name)
        if name in earlier:
            kept = {key: getattr(earlier[name], key) for key in kind.learned if getattr(settings, key) is None}
            settings = dataclasses.replace(settings, **kept)
        tasks[name] = kind.learn_settings(settings, config, samples)
    model = dataclasses.replace(config.model, quick_gelu=wants_quick_gelu(config.model))
    return dataclasses.replace(config, tasks=tasks, model=model)


def start_from(model: nn.Module, init: Path) -> str:
    """Takes an export's weights: its backbone, and the heads of the tasks that both have. Says so in one line.

    Raises:
        UserError: a weight of both is of another shape, or the backbone is of another kind.
    """
    state = load_file(init / WEIGHTS)
    own = model.state_dict()
    for name in own:
        if difference := different_shape(name, state, own):
            raise UserError(f"--init {init}: {difference}; give the same model and task settings")
        if name.startswith("backbone.") and name not in state:
            raise UserError(f"--init {init}: it lacks {name}; give the same model settings")
    taken = {name: value for name, value in state.items() if name in own}
    model.load_state_dict(taken, strict=False)
    parts = sorted({".".join(name.split(".")[:2]) if name.startswith("tasks.") else "backbone" for name in taken})
    new = sorted({".".join(name.split(".")[:2]) for name in own if name.startswith("tasks.") and name not in taken})
    return f"starts from {init}: {', '.join(parts)}" + (f"; new: {', '.join(new)}" if new else "")
