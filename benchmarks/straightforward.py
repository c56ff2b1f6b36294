"""A direct implementation of EMCL's formulas and its similarity: the reference for tests and benchmarks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def reference_em(x_ND: Tensor, mu_K: Tensor, *, iterations: int = 9, temperature: float = 1.0) -> Tensor:
    """X_hat (N, D) by the published iterations."""
    codes = mu_K.expand(len(x_ND), -1)
    for _ in range(iterations):
        bases = torch.softmax(x_ND.T @ codes / temperature, dim=1)
        bases = bases / (1e-6 + bases.sum(0))
        codes = x_ND @ bases
        codes = codes / (1e-6 + codes.norm(dim=0))
    return codes @ bases.T


def pooled_rows(text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, temperature: float) -> Tensor:
    """Text-conditioned pooling of each video for each text: (A, B, D)."""
    weights_ABT = torch.einsum("ad,btd->abt", text_AD, frames_BTD).div(temperature).softmax(-1)
    return torch.einsum("abt,btd->abd", weights_ABT * mask_BT.to(weights_ABT.dtype), frames_BTD)


def cosines(pooled_ABD: Tensor, text_AD: Tensor) -> Tensor:
    return torch.einsum("abd,ad->ab", F.normalize(pooled_ABD, dim=-1), F.normalize(text_AD, dim=-1))


def reference_similarity(
    text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, mu_K: Tensor, *, temperature: float, beta: float
) -> Tensor:
    """EMCL-Net's similarity (A, B): pooling, EM over the stacked rows, cosine."""
    pooled_ABD = pooled_rows(text_AD, frames_BTD, mask_BT, temperature)
    width = text_AD.shape[-1]
    rows = torch.cat([pooled_ABD.reshape(-1, width), text_AD])
    with torch.no_grad():
        correction = beta * reference_em(rows.detach(), mu_K)
    rows = rows + correction
    return cosines(rows[: -len(text_AD)].view_as(pooled_ABD), rows[-len(text_AD) :])
