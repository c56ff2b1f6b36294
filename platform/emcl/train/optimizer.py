"""Parameter groups, the optimiser and its schedule, as EMCL-Net sets them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from emcl.train.settings import OptimConfig


def is_clip_weight(name: str) -> bool:
    """Belongs to a tower's trunk, which learns with CLIP's own rate."""
    return any(f"{tower}.trunk." in name for tower in ("image", "text")) and ".temporal." not in name


def decays(parameter: nn.Parameter, name: str) -> bool:
    """Matrices decay; biases, norms and scales do not."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty
    return len(shape) >= 2 and not name.endswith("bias")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Up to four groups: {CLIP, new} x {decay, no decay}; frozen parameters are in none."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            groups.setdefault((is_clip_weight(name), decays(parameter, name)), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": config.clip_lr if clip else config.lr,
            "weight_decay": config.weight_decay if decay else 0.0,
            "name": f"{'clip' if clip else 'new'}_{'decay' if decay else 'no_decay'}",
        }
        for (clip, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def group_names(model: nn.Module, config: OptimConfig) -> list[list[str]]:
    """The names of the weights in each of `parameter_groups`, in order; the same at every ZeRO stage."""
    named = list(model.named_parameters())
    name_of = {id(parameter): name for name, parameter in named}
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in parameter_groups(named, config)]


class CheckedAdamW(torch.optim.AdamW):
    """Leaves out a step whose gradient is not finite and says so by `overflow`, as DeepSpeed's own optimisers do.

    For training without ZeRO, where DeepSpeed takes any gradient. Gradients are those of all ranks by then, so all of
    them decide alike; that waits for the device once a step, as ZeRO does.
    """

    overflow = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        gradients = [
            weight.grad for group in self.param_groups for weight in group["params"] if weight.grad is not None
        ]
        norms = torch.stack(torch._foreach_norm(gradients))
        self.overflow = not bool(norms.isfinite().all())
        return None if self.overflow else super().step(closure)


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, offload: bool, fused: bool, checked: bool = False
) -> torch.optim.Optimizer:
    """AdamW; DeepSpeed's CPU Adam where the optimiser's state is offloaded; `checked` where nothing else checks."""
    groups = parameter_groups(model.named_parameters(), config)
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return (CheckedAdamW if checked else torch.optim.AdamW)(groups, fused=fused, **settings)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> Any:
    """Linear warm-up over a share of the steps, then a cosine to zero."""
    return get_cosine_schedule_with_warmup(optimizer, round(config.warmup * steps), steps)
