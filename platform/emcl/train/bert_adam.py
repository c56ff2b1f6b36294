"""Adam as BERT's first PyTorch code has it (BertAdam), by which CLIP4Clip and EMCL-Net were trained.

It differs from AdamW in three details: no bias correction, eps outside of the root of an uncorrected moment, and each
weight's own gradient cut to a norm. Moments have their weight's number format, as there. In fp16 that matters more than
all else: of a gradient below 0.0012, (1 - b2) g^2 is 0, and where the second moment is 0 a step is rate / eps times the
gradient's mean. So each product is rounded where the published code rounds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Optimizer

from emcl.errors import UserError
from emcl.settings import group
from emcl.train.optimizer import OptimizerKind
from emcl.train.train_settings import OptimConfig

AT_ONCE = 2**24
"""Numbers of weights, unless one has more: an update holds three copies of theirs."""


@group
class BertAdamConfig:
    """Settings of BertAdam."""

    max_norm: float = Field(
        1.0, ge=0, description="Largest norm of each weight's own gradient, after `optim.grad_clip`; 0 does not clip."
    )


class BertAdamKind(OptimizerKind):
    """BertAdam; `optim.betas`, `optim.eps`."""

    config_class = BertAdamConfig

    @classmethod
    def check(cls, optim: OptimConfig, settings: BertAdamConfig, stage: int) -> None:
        if stage and _clips(optim, settings):
            raise UserError(
                f"optim.optimizer=bert_adam cuts each weight's gradient to norm {settings.max_norm:g}, which ZeRO "
                f"{stage} does not hold weight by weight: give optim.grad_clip={settings.max_norm:g} or less (but 0), "
                "deepspeed=deepspeed/zero0.json, or optim.optimizer_options.max_norm=0"
            )

    @classmethod
    def build(
        cls, groups: list[dict[str, Any]], optim: OptimConfig, settings: BertAdamConfig, *, fused: bool
    ) -> Optimizer:
        max_norm = settings.max_norm if _clips(optim, settings) else 0.0
        return BertAdam(groups, lr=optim.lr, betas=(optim.betas[0], optim.betas[1]), eps=optim.eps, max_norm=max_norm)


def _clips(optim: OptimConfig, settings: BertAdamConfig) -> bool:
    """Whether the second cut can change anything: no weight's norm is above that of all together."""
    return settings.max_norm > 0 and not 0 < optim.grad_clip <= settings.max_norm


class BertAdam(Optimizer):
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;  w -= lr (m / (sqrt(v) + eps) + decay w).

    Args:
        max_norm: of each weight's gradient; 0 does not clip.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        max_norm: float = 1.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        for options in self.param_groups:
            for weights in _of_one_format(options["params"]):
                self._update(weights, options)
        return loss

    def _update(self, weights: list[Tensor], options: dict[str, Any]) -> None:
        """By few kernels for all; every line rounds once, as one of the published code's does."""
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        means, squares = (list(moments) for moments in zip(*map(self._moments, weights), strict=True))
        if options["max_norm"]:
            gradients = _each_within(gradients, options["max_norm"])
        beta1, beta2 = options["betas"]
        _multiply(means, beta1)
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        _multiply(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        divisors = torch._foreach_sqrt(squares)
        torch._foreach_add_(divisors, options["eps"])
        updates = list(torch._foreach_div(means, divisors))
        if options["weight_decay"]:
            decays = [weight.clone() for weight in weights]
            _multiply(decays, options["weight_decay"])
            torch._foreach_add_(updates, decays)
        _multiply(updates, -options["lr"])
        torch._foreach_add_(weights, updates)

    def _moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        state = self.state[weight]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state["exp_avg"], state["exp_avg_sq"]


def _of_one_format(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """Those with a gradient, some at a time, together by number format, which the kernels for lists want."""
    with_gradient = [weight for weight in weights if weight.grad is not None]
    for _, alike in groupby(sorted(with_gradient, key=_format), _format):
        some: list[Tensor] = []
        numbers = 0
        for weight in alike:
            if some and numbers + weight.numel() > AT_ONCE:
                yield some
                some, numbers = [], 0
            some.append(weight)
            numbers += weight.numel()
        yield some


def _format(weight: Tensor) -> tuple[str, str]:
    return str(weight.dtype), str(weight.device)


def _multiply(tensors: list[Tensor], factor: float) -> None:
    """In place. For lists on CPUs, PyTorch rounds the factor to the tensors' format: in fp16, 1e-7 to 1.2e-7."""
    if tensors[0].device.type == "cpu":
        for tensor in tensors:
            tensor.mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)


def _each_within(gradients: list[Tensor], norm: float) -> list[Tensor]:
    """Each cut to the norm by itself, as `clip_grad_norm_` does, without waiting for the device."""
    norms = torch.stack(list(torch._foreach_norm(gradients)))
    shares = (norm / (norms + 1e-6)).clamp(max=1.0)
    return list(torch._foreach_mul(gradients, list(shares.unbind())))
