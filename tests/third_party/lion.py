"""An optimiser and a schedule of somebody else's: Lion (Chen et al., NeurIPS 2023), and the root of the steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field

from emcl.train.optimizer import OptimizerKind
from emcl.train.train_settings import OptimConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class LionConfig:
    """Settings of its own."""

    beta1: Beta = 0.9
    beta2: Beta = 0.99


class Lion(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                average = self.state[weight].setdefault("exp_avg", torch.zeros_like(weight))
                sign = average.lerp(weight.grad, 1 - group["beta1"]).sign_()
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(sign, alpha=-group["lr"])
                average.lerp_(weight.grad, 1 - group["beta2"])


class LionKind(OptimizerKind):
    config_class = LionConfig
    numbers_kept = 1

    @classmethod
    def build(
        cls, groups: list[dict[str, Any]], optim: OptimConfig, settings: LionConfig, *, fused: bool
    ) -> torch.optim.Optimizer:
        return Lion(groups, {"lr": optim.lr, "beta1": settings.beta1, "beta2": settings.beta2})


def root(optimizer: torch.optim.Optimizer, warmup: int, steps: int) -> Any:
    def factor(step: int) -> float:
        return min((step + 1) / (warmup + 1), ((warmup + 1) / (step + 1)) ** 0.5)

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
