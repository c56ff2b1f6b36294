"""Batch norms in a model that trains in half precision.

DeepSpeed casts parameters and leaves buffers: weights and bias in bf16 beside statistics in fp32, which PyTorch refuses
on CPUs. The other way, statistics in bf16, would round each step's small change of them away. So the layer itself works
with its weights in the statistics' precision; its input and output stay in that of the model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_statistics_in_full_precision(model: nn.Module) -> None:
    """Lets every batch norm of `model`, timm's with an activation too, take weights of less precision than buffers."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _MixedPrecision):
            kind: Any = type(module)
            module.__class__ = _mixed_precision(kind)


class _MixedPrecision:
    """Goes before a kind of batch norm."""

    def forward(self: Any, inputs: Tensor) -> Tensor:
        statistics = self.running_mean
        own = {name: weight for name, weight in self._parameters.items() if weight is not None}
        if statistics is None or all(weight.dtype == statistics.dtype for weight in own.values()):
            return super().forward(inputs)  # type: ignore[misc]
        self._parameters.update({name: weight.to(statistics.dtype) for name, weight in own.items()})
        try:
            return super().forward(inputs)  # type: ignore[misc]
        finally:
            self._parameters.update(own)


@cache
def _mixed_precision(kind: Any) -> Any:
    return type(kind.__name__, (_MixedPrecision, kind), {})
