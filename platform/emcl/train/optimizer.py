"""Parameter groups as EMCL-Net sets them, and the optimiser by its name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from emcl.components import OPTIMIZERS
from emcl.settings import group
from emcl.train.train_settings import OptimConfig

KINDS = ("new", "clip", "logit_scale")
"""Of weights, by their learning rates."""


def is_clip_weight(name: str) -> bool:
    """Whether the weight belongs to a tower's trunk, which has CLIP's own learning rate."""
    return any(f"{tower}.trunk." in name for tower in ("image", "text")) and ".temporal." not in name


def kind_of(name: str, config: OptimConfig) -> str:
    """Which of `KINDS` a weight is; a logit scale or bias is new unless it has a rate of its own."""
    if config.logit_scale_lr is not None and name.rpartition(".")[2] in ("logit_scale", "logit_bias"):
        return "logit_scale"
    return "clip" if is_clip_weight(name) else "new"


def decays(parameter: nn.Parameter, name: str, config: OptimConfig) -> bool:
    """Whether `optim.weight_decay` is for this weight; see `optim.decay`."""
    if config.decay == "all_but_biases":
        return "bias" not in name
    shape = getattr(parameter, "ds_shape", parameter.shape)  # under ZeRO-3 the parameter itself is empty
    return len(shape) >= 2 and not name.endswith("bias")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], config: OptimConfig) -> list[dict[str, Any]]:
    """Up to six groups: `KINDS` x {decay, no decay}; frozen parameters are in none."""
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            key = KINDS.index(kind_of(name, config)), decays(parameter, name, config)
            groups.setdefault(key, []).append(parameter)
    rates = {"new": config.lr, "clip": config.backbone_lr, "logit_scale": config.logit_scale_lr}
    return [
        {
            "params": parameters,
            "lr": rates[KINDS[kind]],
            "weight_decay": config.weight_decay if decay else 0.0,
            "name": f"{KINDS[kind]}_{'decay' if decay else 'no_decay'}",
        }
        for (kind, decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def group_names(model: nn.Module, config: OptimConfig) -> list[list[str]]:
    """The names of the weights in each of `parameter_groups`, in order; the same at every ZeRO stage."""
    named = list(model.named_parameters())
    name_of = {id(parameter): name for name, parameter in named}
    return [[name_of[id(parameter)] for parameter in group["params"]] for group in parameter_groups(named, config)]


class OptimizerKind:
    """Base class of optimisers, which are listed in `emcl.components`. The classes are never instantiated."""

    config_class: ClassVar[type | None] = None
    """A frozen dataclass of the kind's own settings, `optim.optimizer_options`."""
    numbers_kept: ClassVar[int] = 2
    """State values for each trained weight, such as a moving average; used to plan memory."""
    offloads: ClassVar[bool] = False
    """Whether there is a version with its state on the CPU (`build_offloaded`)."""
    converts: ClassVar[bool] = False
    """Whether its state is Adam's, so that runs can resume on any ranks and ZeRO stage (train/reshard.py)."""

    @classmethod
    def check(cls, optim: OptimConfig, settings: Any, stage: int) -> None:
        """Raises UserError, before the work: settings, or a ZeRO stage, that do not go together."""

    @classmethod
    def build(cls, groups: list[dict[str, Any]], optim: OptimConfig, settings: Any, *, fused: bool) -> Optimizer:
        """PyTorch's optimiser over the groups, each of which has its own `lr` and `weight_decay`.

        Args:
            settings: an instance of `config_class`, or None without one.
            fused: whether the weights are on a GPU, where one kernel can update them all.
        """
        raise NotImplementedError

    @classmethod
    def build_offloaded(cls, groups: list[dict[str, Any]], optim: OptimConfig, settings: Any) -> Optimizer:
        """The version whose state the CPU holds and updates, for a DeepSpeed file that offloads it; with `offloads`."""
        raise NotImplementedError


class AdamW(OptimizerKind):
    """Adam with decoupled weight decay (Loshchilov and Hutter, ICLR 2019); offloaded, DeepSpeed's."""

    converts = offloads = True

    @classmethod
    def build(cls, groups: list[dict[str, Any]], optim: OptimConfig, settings: Any, *, fused: bool) -> Optimizer:
        return torch.optim.AdamW(groups, lr=optim.lr, betas=_two(optim.betas), eps=optim.eps, fused=fused)

    @classmethod
    def build_offloaded(cls, groups: list[dict[str, Any]], optim: OptimConfig, settings: Any) -> Optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=optim.lr, betas=_two(optim.betas), eps=optim.eps, adamw_mode=True)


@group
class SGDConfig:
    """Settings of SGD."""

    momentum: float = Field(0.9, ge=0, lt=1, description="Share of the earlier gradients' mean that stays.")
    nesterov: bool = Field(False, description="Look ahead along it (Nesterov).")

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=true wants a momentum above 0")


class SGD(OptimizerKind):
    """Stochastic gradient descent with momentum."""

    config_class = SGDConfig
    numbers_kept = 1

    @classmethod
    def build(cls, groups: list[dict[str, Any]], optim: OptimConfig, settings: Any, *, fused: bool) -> Optimizer:
        momentum, nesterov = settings.momentum, settings.nesterov
        return torch.optim.SGD(groups, lr=optim.lr, momentum=momentum, nesterov=nesterov, fused=fused)


def _two(betas: list[float]) -> tuple[float, float]:
    return betas[0], betas[1]


def build_optimizer(
    model: nn.Module, config: OptimConfig, *, offload: bool, fused: bool, checked: bool = False
) -> Optimizer:
    """The configured optimiser.

    Args:
        offload: whether the CPU holds and updates its state.
        fused: whether the weights are on a GPU.
        checked: whether it skips steps whose gradient is not finite, where DeepSpeed does not (ZeRO 0 in fp32).
    """
    groups = parameter_groups(model.named_parameters(), config)
    kind = optimizer_class(config)
    settings = OPTIMIZERS.options(config.optimizer, config.optimizer_options)
    if offload:
        return kind.build_offloaded(groups, config, settings)
    optimizer = kind.build(groups, config, settings, fused=fused)
    if checked:
        optimizer.__class__ = _checked(type(optimizer))  # type: ignore[arg-type]
    return optimizer


def check_optimizer(config: OptimConfig, stage: int) -> None:
    """Raises UserError: no such optimiser, or its settings do not go with the others or with ZeRO's stage."""
    settings = OPTIMIZERS.options(config.optimizer, config.optimizer_options)
    optimizer_class(config).check(config, settings, stage)


def optimizer_class(config: OptimConfig) -> type[OptimizerKind]:
    """Raises UserError: no such optimiser."""
    kind: type[OptimizerKind] = OPTIMIZERS.load_class(config.optimizer, OptimizerKind)
    return kind


class _Checked:
    """Skips a step whose gradient is not finite and sets `overflow`, as DeepSpeed's own optimisers do.

    For training without ZeRO, where DeepSpeed does not check. Gradients are reduced over all ranks by then, so all of
    them decide alike; it waits for the device once a step, as ZeRO does. A mixin before a PyTorch optimiser.
    """

    overflow = False

    @torch.no_grad()
    def step(self: Any, closure: Any = None) -> Any:
        gradients = [
            weight.grad for group in self.param_groups for weight in group["params"] if weight.grad is not None
        ]
        norms = torch.stack(torch._foreach_norm(gradients))
        self.overflow = not bool(norms.isfinite().all())
        return None if self.overflow else super().step(closure)  # type: ignore[misc]


@cache
def _checked(kind: Any) -> Any:
    return type(f"Checked{kind.__name__}", (_Checked, kind), {})
