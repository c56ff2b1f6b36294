"""Pooling of a video's frames, conditioned on a text or not."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def frame_scores(text_AD: Tensor, frames_BTD: Tensor) -> Tensor:
    """<text, frame> of every text and frame, as one matrix product: (A, B, T)."""
    return F.linear(text_AD, frames_BTD.flatten(0, 1)).view(len(text_AD), *frames_BTD.shape[:2])


def pooling_weights(scores_ABT: Tensor, mask_BT: Tensor, temperature: float) -> Tensor:
    """The weight of each frame of each video for each text: (A, B, T).

    Softmax over frames of <text, frame> / temperature, then masked without renormalisation, as published.
    """
    return scores_ABT.div(temperature).softmax(-1) * mask_BT.to(scores_ABT.dtype)


def mean_of_frames(frames_BTD: Tensor, mask_BT: Tensor) -> Tensor:
    """One vector a video, independent of the text: (B, D)."""
    weights = mask_BT.unsqueeze(-1).to(frames_BTD.dtype)
    return (frames_BTD * weights).sum(1) / weights.sum(1).clamp_min(1)
