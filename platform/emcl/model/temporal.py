"""A transformer over the frames of a video, with a residual around it (CLIP4Clip's seqTransf, as EMCL-Net uses it)."""

from __future__ import annotations

import copy

import torch
from open_clip.transformer import ResidualAttentionBlock, TextTransformer
from torch import Tensor, nn

from emcl.model.initial_weights import begin_as_published
from emcl.model.model_settings import MAX_FRAMES

POSITION_SCALE = 0.5
"""Standard deviation of randomly initialised positions. Frame embeddings have elements of size 1: with CLIP's own 0.01
for untrained towers, positions would be 1% of the blocks' input, and the order of frames would not be learnt."""


class TemporalTransformer(nn.Module):
    """Lets each frame attend to the others, with its position in time.

    Where a pretrained text tower of the same width is given, positions and the first blocks start as copies of its own
    (EMCL-Net's set-up); else they are random.

    Args:
        projection: whether a linear map follows the blocks, before the residual is added.
    """

    def __init__(self, width: int, layers: int, text: nn.Module | None = None, *, projection: bool = False) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        fits = isinstance(text, TextTransformer) and text.width == width and len(text.transformer.resblocks) >= layers
        self.positions = nn.Parameter(torch.randn(MAX_FRAMES, width) * POSITION_SCALE)
        if fits:
            assert isinstance(text, TextTransformer)
            self.heads = text.heads
            self.blocks = nn.ModuleList(copy.deepcopy(block) for block in text.transformer.resblocks[:layers])
            with torch.no_grad():
                count = min(MAX_FRAMES, len(text.positional_embedding))
                self.positions[:count] = text.positional_embedding[:count]
        else:
            self.blocks = nn.ModuleList(ResidualAttentionBlock(width, self.heads) for _ in range(layers))
        self.projection: nn.Linear | None = None
        if projection:
            self.projection = nn.Linear(width, width)
            begin_as_published(self.projection)

    def forward(self, frames_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D) and mask (B, T) -> (B, T, D)."""
        length = frames_BTD.shape[1]
        # a video without any frame would give a row of -inf and NaN: a large finite number instead
        hidden = torch.zeros_like(mask_BT, dtype=frames_BTD.dtype).masked_fill(~mask_BT, -1e4)
        attention = hidden[:, None, :].expand(-1, length, -1).repeat_interleave(self.heads, 0)  # (B heads, T, T)
        out = frames_BTD + self.positions[:length].to(frames_BTD.dtype)
        for block in self.blocks:
            out = block(out, attn_mask=attention)
        return frames_BTD + (out if self.projection is None else self.projection(out))
