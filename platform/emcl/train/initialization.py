"""What training starts with: settings derived from the training split, and weights of an earlier run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from emcl.config import Config
from emcl.data.captions import Tokens
from emcl.data.split import Split, open_split, open_training_split
from emcl.errors import UserError, said_of
from emcl.model.backbone import backbone_class, tokenizer_of
from emcl.registry import task_class
from emcl.run_folder import WEIGHTS, saved_config
from emcl.train.export import different_shape
from emcl.train.run_config import as_trained, with_frames_of

UNCERTAINTY = "uncertainty.log_variance"
"""Name of `Uncertainty`'s weight."""


def open_splits(config: Config, init: Path | None = None, *, begun: bool = False) -> tuple[Config, Split, Split | None]:
    """The configuration completed from the training samples, the training split, and the split that chooses, if any.

    Opened and checked before the process group exists, so that an error costs no rendezvous.

    Args:
        begun: whether the settings are of a run that goes on.

    Raises:
        UserError: shards that are missing or damaged, a task without a sample.
    """
    training = open_training_split(config.data, config.seed)
    config = learn_settings(config, training, init, begun=begun)
    tokenizer = tokenizer_of(config)  # of the completed settings, so that the tasks' collators get the same cached one
    training = dataclasses.replace(training, tokens=Tokens(tokenizer))
    chooses_by = config.chooses_by()
    return config, training, open_split(chooses_by, tokenizer) if chooses_by else None


def learn_settings(config: Config, training: Split, init: Path | None = None, *, begun: bool = False) -> Config:
    """The configuration with every task's vocabulary and similar settings, from the training samples and the weights.

    A task that `init` was trained for keeps that run's settings, since its weights belong to that vocabulary.
    """
    earlier: dict[str, Any] = tasks_of_both(config, saved_config(init)) if init else {}
    samples = [row.sample for row in training.shards.rows]
    tasks = {}
    for name, settings in config.tasks.items():
        kind = task_class(config.kind_of(name))
        if name in earlier:
            kept = {key: getattr(earlier[name], key) for key in kind.learned if getattr(settings, key) is None}
            settings = dataclasses.replace(settings, **kept)
        with said_of(name):
            tasks[name] = kind.learn_settings(settings, config, samples)
    config = dataclasses.replace(config, tasks=tasks)
    return as_pretrained(as_trained(config, saved_config(init)) if init else config, begun=begun)


def as_pretrained(config: Config, *, begun: bool = False) -> Config:
    """The settings, with what only the pretrained weights tell: activation, and how they want frames.

    A run that has `begun` keeps its frames: where it does not say how they are wanted, it began when none was asked.
    """
    kind = backbone_class(config.model)
    config = dataclasses.replace(config, model=kind.completed(config.model))
    known = None if begun else kind.preprocessing(config.model)
    return config if known is None else with_frames_of(config, known, known)


def tasks_of_both(config: Config, earlier: Config) -> dict[str, Any]:
    """The settings in `earlier` of the tasks that have the same name and kind in both."""
    both = [name for name in earlier.tasks if name in config.tasks and earlier.kind_of(name) == config.kind_of(name)]
    return {name: earlier.tasks[name] for name in both}


def start_from(model: nn.Module, init: Path, config: Config) -> str:
    """Loads an export's backbone, and the heads of the tasks that both have. Returns a line that says so.

    Raises:
        UserError: a weight of both is of another shape, or the backbone is of another kind.
    """
    earlier, own = saved_config(init), model.state_dict()
    both = tasks_of_both(config, earlier)
    heads = tuple(f"tasks.{name}." for name in both)
    weights = load_file(init / WEIGHTS)
    state = {name: weight for name, weight in weights.items() if name.startswith(("backbone.", *heads))}
    if UNCERTAINTY in weights and UNCERTAINTY in own:  # one number a task
        of_task = dict(zip(earlier.tasks, weights[UNCERTAINTY], strict=True))
        kept = [of_task[name] if name in both else own[UNCERTAINTY][index] for index, name in enumerate(config.tasks)]
        state[UNCERTAINTY] = torch.stack([number.cpu() for number in kept])
    for name in own:
        if difference := different_shape(name, state, own):
            raise UserError(f"--init {init}: {difference}; give the same model and task settings")
        if name.startswith("backbone.") and name not in state:
            raise UserError(f"--init {init}: it lacks {name}; give the same model settings")
    taken = {name: value for name, value in state.items() if name in own}
    model.load_state_dict(taken, strict=False)
    module_names = sorted(
        {".".join(name.split(".")[:2]) if name.startswith("tasks.") else name.split(".")[0] for name in taken}
    )
    new = sorted({".".join(name.split(".")[:2]) for name in own if name.startswith("tasks.") and name not in taken})
    return f"starts from {init}: {', '.join(module_names)}" + (f"; new: {', '.join(new)}" if new else "")
