"""A small convolutional image tower, for sets that are learnt from scratch on little compute.

There a convolution's built-in locality is worth more than a transformer's freedom. Group norms, not batch norms: the
loss must not depend on how the global batch is split over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

GROUPS = 8


class ConvTower(nn.Module):
    """Pixels (n, 3, S, S) -> (n, embed_dim).

    Each of `widths` halves the side; the last map is read out by place, so the embedding knows where things are.
    """

    def __init__(self, widths: Sequence[int], image_size: int, embed_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for index, width in enumerate(widths):
            layers += _layer(before, width, stride=2)
            if index:
                layers += _layer(width, width, stride=1)
            before = width
        side = image_size // 2 ** len(widths)
        self.layers = nn.Sequential(*layers)
        self.readout = nn.Linear(before * side * side, embed_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        maps = self.layers(pixels.contiguous(memory_format=torch.channels_last))
        return self.readout(maps.contiguous().flatten(1))


def _layer(before: int, width: int, *, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(before, width, 3, stride, 1), nn.GroupNorm(GROUPS, width), nn.GELU()]
