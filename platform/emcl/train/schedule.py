"""How the learning rates of all groups go over the steps; each is a function of `emcl.components.SCHEDULES`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from emcl.components import SCHEDULES
from emcl.train.settings import OptimConfig


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Any:
    """The schedule that is set, over so many steps."""
    return SCHEDULES.load(config.schedule)(optimizer, round(config.warmup * steps), steps)


def cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """A straight rise over `warmup` steps, then half a cosine down to zero; EMCL-Net's."""
    return get_cosine_schedule_with_warmup(optimizer, warmup, steps)


def linear(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """A straight rise, then a straight fall to zero."""
    return get_linear_schedule_with_warmup(optimizer, warmup, steps)


def constant(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """A straight rise, then no change."""
    return get_constant_schedule_with_warmup(optimizer, warmup)
