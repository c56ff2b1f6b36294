"""The two towers that a backbone is made of, each split into a trunk and a last projection, the head.

The trunk may be frozen and has the small learning rate of pretrained weights; a new head has the rate of new modules.
The outputs of a frozen trunk for frames or sentences can be cached.
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
        self.dropout = nn.Dropout(0.0)  # `model.head_dropout`

    def forward(self, inputs: Tensor) -> Tensor:
        return self.project(self.trunk(inputs))

    def project(self, outputs: Tensor) -> Tensor:
        """Outputs of the trunk (n, width) -> (n, D)."""
        return self.head(self.dropout(outputs))


class TextTower(Tower):
    """A tower that also returns its tokens.

    Args:
        token_width: width of what `tokens` returns.
        padding: the token id of padding.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module, width: int, token_width: int, padding: int) -> None:
        super().__init__(trunk, head, width)
        self.token_width, self.padding = token_width, padding

    def tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) -> the trunk's last layer (B, L, token_width), and the token mask (B, L)."""
        raise NotImplementedError

    def projected(self, tokens_BLW: Tensor) -> Tensor:
        """Tokens as the sentence's embedding would be made from each: (B, L, D)."""
        return self.project(tokens_BLW)


@dataclass(frozen=True)
class Preprocessing:
    """How frames become a tower's input, as it was pretrained."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the three colours, from 0 to 1."""
    resize_mode: str
    """`shortest` or `squash` (`data.resize_mode`)."""
    interpolation: str


@dataclass(frozen=True)
class Towers:
    """Both towers, with further facts of a pretrained model."""

    image: Tower
    text: TextTower
    embed_dim: int
    """D, of both."""
    logit_scale: float
    """Natural logarithm, as pretrained."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Of the three colours, from 0 to 1, to normalise pixels."""
    logit_bias: float | None = None
    """As pretrained with the sigmoid loss."""
