"""A direct implementation of EMCL's formulas and its similarity: the reference for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

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


def shared_factors(
    video_ND: Tensor, text_MD: Tensor, owner_M: Tensor, *, bases: int, iterations: int, shrinkage: tuple[float, float]
) -> Callable[[Tensor, Tensor], Tensor]:
    """The shared factors' formulas on whole matrices; returns the score of texts (A, D_t) with videos (B, D_v)."""
    m_v, m_t = video_ND.mean(0), text_MD.mean(0)
    u_v, u_t = F.normalize(video_ND - m_v, dim=1), F.normalize(text_MD - m_t, dim=1)
    n_v, n_t = u_v.mean(0), u_t.mean(0)
    x_ND, y_MD = u_v - n_v, u_t - n_t
    texts_N = torch.bincount(owner_M, minlength=len(x_ND))
    y_ND = y_MD.new_zeros(len(x_ND), y_MD.shape[1]).index_add_(0, owner_M, y_MD) / texts_N.clamp_min(1)[:, None]
    c_v, c_t, c_tv = x_ND.T @ x_ND / len(x_ND), y_MD.T @ y_MD / len(y_MD), y_ND.T @ x_ND / (texts_N > 0).sum()
    roots = [
        torch.linalg.cholesky(c + s * c.trace() / len(c) * torch.eye(len(c), dtype=c.dtype))
        for c, s in zip((c_v, c_t), shrinkage, strict=True)
    ]
    whitened = torch.linalg.solve(roots[1], torch.linalg.solve(roots[0], c_tv.T).T)  # (D_t, D_v)
    q = torch.linalg.qr(torch.randn(len(c_v), bases, dtype=c_v.dtype))[0]
    for _ in range(iterations):
        p = torch.linalg.qr(whitened @ q)[0]
        q = torch.linalg.qr(whitened.T @ p)[0]
    left, r, right = torch.linalg.svd(whitened @ q, full_matrices=False)
    r = r.clamp_max(0.98)
    b_t, b_v = torch.linalg.solve(roots[1].T, left), torch.linalg.solve(roots[0].T, q @ right.T)

    def score(text_AD: Tensor, video_BD: Tensor) -> Tensor:
        a = (F.normalize(text_AD - m_t, dim=1) - n_t) @ b_t
        b = (F.normalize(video_BD - m_v, dim=1) - n_v) @ b_v
        pairs = r * a[:, None] * b - r.square() * (a[:, None].square() + b.square()) / 2  # (A, B, K)
        return (pairs / (1 - r.square())).sum(-1)

    return score
