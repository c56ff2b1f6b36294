"""How new layers begin in EMCL-Net's code; ours begin as PyTorch has it."""

from __future__ import annotations

from torch import nn

SCALE = 0.02


def begin_as_published(module: nn.Module) -> None:
    """Weights of linear layers from N(0, 0.02), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=SCALE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
