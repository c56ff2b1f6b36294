"""Batch norms in a model that trains in half precision.

DeepSpeed casts parameters but not buffers: weights and bias are in bf16 and statistics in fp32, which PyTorch does not
support on CPUs. The other way, statistics in bf16 would lose each step's small update to rounding. So the layer
computes with its weights cast to the statistics' precision; its input and output keep that of the model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_statistics_in_full_precision(model: nn.Module) -> None:
    """Lets every batch norm of `model`, timm's with an activation too, have weights of lower precision than buffers."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not isinstance(module, _MixedPrecision):
            kind: Any = type(module)
            module.__class__ = _mixed_precision(kind)


class _MixedPrecision:
    """A mixin before a class of batch norm."""

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
