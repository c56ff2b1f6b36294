"""EMCL-Net's head for question answering: attention pooling of both modalities, a projection, a classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from emcl.model.initial_weights import begin_as_published


class AttentionPooling(nn.Module):
    """A learned weight for each item: Linear, ReLU, Linear to 1, softmax (a bias before it would have no effect).

    Args:
        reference: whether absent items take part in the softmax and are masked afterwards, as in EMCL-Net's code, so
            that the fewer items are present, the shorter is the result.
    """

    def __init__(self, width: int, *, reference: bool = False) -> None:
        super().__init__()
        self.reference = reference
        self.score = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1, bias=False))

    def forward(self, items_NLW: Tensor, mask_NL: Tensor) -> Tensor:
        """(N, L, W), (N, L) -> (N, W); without any item, their mean (reference: 0)."""
        scores_NL = self.score(items_NLW).squeeze(-1).float()
        if self.reference:
            weights_NL = scores_NL.softmax(-1) * mask_NL
        else:
            weights_NL = scores_NL.masked_fill(~mask_NL, -1e4).softmax(-1)
        return torch.einsum("nl,nlw->nw", weights_NL.to(items_NLW.dtype), items_NLW)


class AnswerHead(nn.Module):
    """Pools frames (D) and question tokens (W), projects both to 4 D, classifies their concatenation.

    Args:
        fusion: `concat`, as published, or `product`, which adds the product of the two: a question then selects parts
        of the video, which the classifier would otherwise have to learn for each pair of words.
        reference: whether pooling and initial weights are those of EMCL-Net's code.
    """

    def __init__(
        self,
        frame_width: int,
        token_width: int,
        answers: int,
        dropout: float,
        fusion: str,
        *,
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.fusion, wide = fusion, 4 * frame_width
        fused = {"concat": 2, "product": 3}[fusion] * wide
        self.video_pooling = AttentionPooling(frame_width, reference=reference)
        self.question_pooling = AttentionPooling(token_width, reference=reference)
        self.video_projection, self.question_projection = nn.Linear(frame_width, wide), nn.Linear(token_width, wide)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout), nn.Linear(fused, 4 * wide), nn.ReLU(), nn.Linear(4 * wide, answers)
        )
        if reference:
            begin_as_published(self)

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
