"""EMCL-Net's head for question answering: attention pooling of both modalities, a projection, a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AttentionPooling(nn.Module):
    """A learned weight for each item: Linear, ReLU, Linear to 1, softmax (a bias before it would have no effect)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1, bias=False))

    def forward(self, items_NLW: Tensor, mask_NL: Tensor) -> Tensor:
        """(N, L, W), (N, L) -> (N, W); without any item, their mean."""
        scores_NL = self.score(items_NLW).squeeze(-1).float().masked_fill(~mask_NL, -1e4)
        return torch.einsum("nl,nlw->nw", scores_NL.softmax(-1).to(items_NLW.dtype), items_NLW)


class AnswerHead(nn.Module):
    """Pools frames (D) and question tokens (W), projects both to 4 D, classifies their concatenation.

    Args:
        fusion: `concat`, as published, or `product`, which adds the product of the two: a question then selects parts
        of the video, which the classifier would otherwise have to learn for each pair of words.
    """

    def __init__(self, frame_width: int, token_width: int, answers: int, dropout: float, fusion: str) -> None:
        super().__init__()
        self.fusion, wide = fusion, 4 * frame_width
        fused = {"concat": 2, "product": 3}[fusion] * wide
        self.video_pooling, self.question_pooling = AttentionPooling(frame_width), AttentionPooling(token_width)
        self.video_projection, self.question_projection = nn.Linear(frame_width, wide), nn.Linear(token_width, wide)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(fused, 4 * wide), nn.ReLU(), nn.Linear(4 * wide, answers)
        )

    def video(self, frames_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """(B, T, D) -> (B, 4 D)"""
        return self.video_projection(self.video_pooling(frames_BTD, mask_BT))

    def question(self, tokens_NLW: Tensor, mask_NL: Tensor) -> Tensor:
        """(N, L, W) -> (N, 4 D)"""
        return self.question_projection(self.question_pooling(tokens_NLW, mask_NL))

    def answer(self, video_NE: Tensor, question_NE: Tensor) -> Tensor:
        """(N, 4 D) each -> logits (N, answers)"""
        both = [video_NE, question_NE]
        if self.fusion == "product":
            both.append(video_NE * question_NE)
        return self.classifier(torch.cat(both, 1))
