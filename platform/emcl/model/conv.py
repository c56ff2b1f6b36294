"""A small convolutional image tower, for data sets that are trained from scratch with little compute.

There a convolution's locality helps more than a transformer's flexibility.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WINDOW, FLOOR = 9, 0.1
"""Side of the window of local contrast, in pixels; and what is added to the standard deviation."""


class ConvTower(nn.Module):
    """Pixels (n, 3, S, S) -> (n, embed_dim).

    Its input is the pixels and their local contrast, in which a faint texture is as visible as a bright edge.

    Each of `widths` is a convolution at full resolution, followed by max pooling to half of it. The last map is read
    out by position, so that the embedding knows where things are, and by its mean and maximum over all positions, so
    that the appearance of things is learnt from all positions at once. No norms: four layers train without, in fewer
    steps and less time.
    """

    def __init__(self, widths: Sequence[int], image_size: int, embed_dim: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 6
        for width in widths:
            convolution = nn.Conv2d(before, width, 3, 1, 1)
            nn.init.kaiming_normal_(convolution.weight)
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
            layers += [convolution, nn.GELU(), nn.MaxPool2d(2)]
            before = width
        side = image_size // 2 ** len(widths)
        self.layers = nn.Sequential(*layers)
        self.by_place = nn.Linear(before * side * side, embed_dim)
        self.anywhere = nn.Linear(2 * before, embed_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        both = torch.cat([pixels, local_contrast(pixels)], 1)
        maps = self.layers(both.contiguous(memory_format=torch.channels_last)).contiguous()
        summary = torch.cat([maps.mean((2, 3)), maps.amax((2, 3))], 1)
        return self.by_place(maps.flatten(1)) + self.anywhere(summary)


def local_contrast(pixels: Tensor) -> Tensor:
    """Pixels less the mean of their surroundings, over its standard deviation: local contrast normalisation.

    Jarrett et al., What is the best multi-stage architecture for object recognition?, ICCV 2009, with square windows.
    """
    difference = pixels - _local_mean(pixels)
    variance = _local_mean(difference.square().mean(1, keepdim=True))
    return difference / (variance.sqrt() + FLOOR)


def _local_mean(maps: Tensor) -> Tensor:
    """Mean over the window, along one axis, then the other; at the border, over the pixels inside the image."""
    half = WINDOW // 2
    rows = F.avg_pool2d(maps, (WINDOW, 1), 1, (half, 0), count_include_pad=False)
    return F.avg_pool2d(rows, (1, WINDOW), 1, (0, half), count_include_pad=False)
