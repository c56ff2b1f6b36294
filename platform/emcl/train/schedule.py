"""Learning rate schedules of all groups; each is a function of `emcl.components.SCHEDULES`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from emcl.components import SCHEDULES
from emcl.train.train_settings import OptimConfig


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Any:
    """The configured schedule over `steps` steps."""
    return SCHEDULES.load(config.schedule)(optimizer, round(config.warmup * steps), steps)


def cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """Linear warm-up over `warmup` steps, then a cosine decay to zero; EMCL-Net's."""
    return get_cosine_schedule_with_warmup(optimizer, warmup, steps)


def linear(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """Linear warm-up, then a linear decay to zero."""
    return get_linear_schedule_with_warmup(optimizer, warmup, steps)


def constant(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """Linear warm-up, then constant."""
    return get_constant_schedule_with_warmup(optimizer, warmup)
