"""Learning rate schedules of all groups; each is a function of `emcl.components.SCHEDULES`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from emcl.components import SCHEDULES
from emcl.train.train_settings import OptimConfig


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Any:
    """The configured schedule over `steps` steps."""
    schedule, warmup = SCHEDULES.load(config.schedule), config.warmup * steps
    return schedule(optimizer, warmup if schedule is warmup_cosine else round(warmup), steps)


def cosine(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """Linear warm-up over `warmup` steps, then a cosine decay to zero, as EMCL-Net's paper has it."""
    return get_cosine_schedule_with_warmup(optimizer, warmup, steps)


def warmup_cosine(optimizer: torch.optim.Optimizer, warmup: float, steps: int) -> Any:
    """The cosine of all steps from the first, below whose beginning the warm-up rises, as EMCL-Net's code has it.

    BertAdam's. Right after a warm-up of a tenth, the rate is at 0.976 of its height. `warmup` may have a fraction.
    """

    def factor(step: int) -> float:
        return step / warmup if step < warmup else (1 + math.cos(math.pi * step / steps)) / 2

    return LambdaLR(optimizer, factor)


def linear(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """Linear warm-up, then a linear decay to zero."""
    return get_linear_schedule_with_warmup(optimizer, warmup, steps)


def constant(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    """Linear warm-up, then constant."""
    return get_constant_schedule_with_warmup(optimizer, warmup)
