"""Losses of texts and videos over the global batch: CLIP's contrastive one with its clamp, and SigLIP's."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from emcl.distributed import ALONE, Ranks

MAX_LOGIT_SCALE = math.log(100)
ABSENT = -1e4
"""A logit whose exponential is 0, but finite, so that a row without any pair does not become NaN."""


def contrastive_loss(
    logits_AB: Tensor, ranks: Ranks = ALONE, present_B: Tensor | None = None, video_B: Tensor | None = None
) -> Tensor:
    """This rank's share of the symmetric cross-entropy over the global batch; the shares add up to the loss.

    Rank r's texts are rows of `logits_AB`, whose pairs are the columns r A to (r + 1) A. Rows are complete here;
    a column's log-sum over the texts of all ranks is exchanged as B numbers, so no rank holds all logits.

    Args:
        present_B: which pairs of all ranks are present; the others are neither positives nor negatives, and the loss is
            the mean over the present ones (0 without any).
        video_B: which video each pair of all ranks is of; two pairs of one video are not negatives of each other.
    """
    own = ranks.share(logits_AB.shape[1])
    present_B, compared_AB = _compared(logits_AB, own, present_B, video_B)
    present_A = present_B[own]
    positives = logits_AB[:, own].diagonal()
    logits_AB = logits_AB.masked_fill(~compared_AB, ABSENT)
    text_to_video = logits_AB.logsumexp(1) - positives
    highest_B = ranks.maximum(logits_AB.amax(0))
    columns_B = ranks.sum_with_grad((logits_AB - highest_B).exp().sum(0)).log() + highest_B
    video_to_text = columns_B[own] - positives
    losses = torch.where(present_A, text_to_video + video_to_text, 0.0)
    return losses.sum() / (2 * present_B.sum().clamp_min(1))


def sigmoid_loss(
    logits_AB: Tensor, ranks: Ranks = ALONE, present_B: Tensor | None = None, video_B: Tensor | None = None
) -> Tensor:
    """This rank's share of SigLIP's loss (Zhai et al., ICCV 2023): each text and video are a pair or not, on their own.

    The sum over all of the global batch's, divided by its size. Arguments as those of `contrastive_loss`.
    """
    own = ranks.share(logits_AB.shape[1])
    present_B, compared_AB = _compared(logits_AB, own, present_B, video_B)
    pairs_AB = torch.zeros_like(compared_AB)
    pairs_AB[:, own].fill_diagonal_(True)
    losses_AB = -F.logsigmoid(torch.where(pairs_AB, logits_AB, -logits_AB))
    return torch.where(compared_AB, losses_AB, 0.0).sum() / present_B.sum().clamp_min(1)


def _compared(logits_AB: Tensor, own: slice, present_B: Tensor | None, video_B: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which pairs of all ranks are present, (B,), and which texts and videos are compared, (A, B)."""
    if present_B is None:
        present_B = torch.ones_like(logits_AB[0], dtype=torch.bool)
    compared_AB = present_B[own][:, None] & present_B[None, :]
    if video_B is not None:
        compared_AB = compared_AB & _of_other_video_or_itself(video_B, own)
    return present_B, compared_AB


def _of_other_video_or_itself(video_B: Tensor, own: slice) -> Tensor:
    """(A, B): whether a pair of all ranks is of another video than a pair of this rank, or is that pair."""
    row_B = torch.arange(len(video_B), device=video_B.device)
    return (video_B[own][:, None] != video_B[None, :]) | (row_B[own][:, None] == row_B[None, :])


def of_own_slice(rows: Tensor, ranks: Ranks) -> Tensor:
    """The features, with their gradient divided by the number of ranks: `optim.gather_with_grad=false`.

    That is the gradient of the published code, whose every rank takes the loss of the whole batch, but gradients of its
    own slice of the gathered features alone, which DistributedDataParallel then averages over the ranks.
    """
    return rows if ranks.world_size == 1 else _Divided.apply(rows, ranks.world_size)


class _Divided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, number: int) -> Tensor:
        ctx.number = number
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] / ctx.number, None


class _ClampScale(torch.autograd.Function):
    """min(scale, maximum), whose gradient vanishes only where a step would go further over the maximum."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, maximum: float) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.maximum = maximum
        return scale.clamp(max=maximum)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        outward = (scale >= ctx.maximum) & (gradients[0] < 0)
        return gradients[0].masked_fill(outward, 0.0), None


def clamp_logit_scale(scale: Tensor) -> Tensor:
    """CLIP's clamp at ln 100, in the forward pass: a clamp of the weight itself would not reach ZeRO's own copies."""
    return _ClampScale.apply(scale, MAX_LOGIT_SCALE)
