"""The two towers that a backbone is made of, each split into a trunk and a last projection, the head.

The trunk is what may be frozen and learns with the small rate of pretrained weights; a head that is new learns with the
rate of new modules. What a trunk says of frames or sentences can be remembered, where it is frozen.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


class Tower(nn.Module):
    """Trunk, then head.

    Args:
        trunk: pixels (n, 3, H, W), or token ids (B, L), to (n, width).
        head: (n, width) to (n, D); `nn.Identity()` where the trunk ends with the projection.
        width: of the trunk's output.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, width: int) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head
        self.width = width

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.trunk(inputs))


class TextTower(Tower):
    """A tower that also shows its single tokens.

    Args:
        token_width: of what `tokens` gives.
        padding: the token id that stands for none.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, width: int, token_width: int, padding: int) -> None:
        super().__init__(trunk, head, width)
        self.token_width, self.padding = token_width, padding

    def tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> the trunk's last layer (B, L, token_width), and which tokens there are (B, L)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Towers:
    """Both, with what else a pretrained model comes with."""

    image: Tower
    text: TextTower
    embed_dim: int
    """D, of both."""
    logit_scale: float
    """Natural logarithm, as pretrained."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the three colours, from 0 to 1, by which pixels are normalised."""
