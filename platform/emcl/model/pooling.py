"""Text-conditioned pooling of a video's frames."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def pooling_weights(text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, temperature: float) -> Tensor:
    """How much each frame counts in each video as each text sees it: (A, B, T).

    Softmax over frames of <text, frame> / temperature, then masked without renormalisation, as published.
    """
    scores_ABT = F.linear(text_AD, frames_BTD.flatten(0, 1)).view(len(text_AD), *mask_BT.shape)
    return scores_ABT.div(temperature).softmax(-1) * mask_BT.to(scores_ABT.dtype)
