"""Text-conditioned pooling of a video's frames."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_frames(text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, temperature: float) -> Tensor:
    """Each video as each text sees it: (A, B, D).

    weights = softmax over frames of <text, frame> / temperature, then masked without renormalisation, as published.
    """
    weights_ABT = torch.einsum("ad,btd->abt", text_AD, frames_BTD).div(temperature).softmax(-1)
    return torch.einsum("abt,btd->abd", weights_ABT * mask_BT.to(weights_ABT.dtype), frames_BTD)
