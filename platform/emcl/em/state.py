"""State that survives casts, and features as tensors: what the layer and the shared factors have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class ExactState(nn.Module):
    """A module whose buffers are made once their sizes are known, and keep their precision when the model is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.state_names: tuple[str, ...] = ()

    def keep(self, **state: Tensor) -> None:
        """Makes these the module's state."""
        for name, value in state.items():
            self.register_buffer(name, value)
        self.state_names = tuple(state)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        exact = {name: getattr(self, name) for name in self.state_names}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            moved = getattr(self, name)
            if moved.dtype != value.dtype:  # .half() and .bfloat16() would round it
                setattr(self, name, value.to(moved.device))
        return self


def as_tensor(features: Any) -> Tensor:
    """NumPy arrays, lists and tensors as a tensor without a gradient."""
    if isinstance(features, Tensor):
        return features.detach()
    reversed_ = any(stride < 0 for stride in getattr(features, "strides", ()))
    return torch.as_tensor(features.copy() if reversed_ else features)
