"""EM for the factors of two modalities, from their covariances: regularised canonical correlations."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .pairs import Covariances

HIGHEST = 0.98
"""Correlations are cut here: r / (1 - r^2) grows without bound, and near 1 rounding decides it."""


class Factors(NamedTuple):
    """Bases of each modality and the correlations of their codes, from the strongest to the weakest."""

    video: Tensor  # B_v (D_v, K)
    text: Tensor  # B_t (D_t, K)
    correlation: Tensor  # r (K,)
    objective: Tensor  # (T + 1,) |M Q|_F before the first iteration and after each


class Axes(NamedTuple):
    """Covariances in their own axes, where whitening with any shrinkage is a scaling."""

    video: Tensor  # (D_v, D_v) eigenvectors, as columns
    text: Tensor  # (D_t, D_t)
    video_variance: Tensor  # (D_v,)
    text_variance: Tensor  # (D_t,)
    cross: Tensor  # (D_t, D_v) the cross-covariance in these axes
    start: Tensor  # (D_v, K) random orthonormal bases to start EM from, in these axes

    @staticmethod
    def of(covariances: Covariances, bases: int, seed: int) -> Axes:
        """With K = `bases`, or as many as the narrower modality allows."""
        video_variance, video = torch.linalg.eigh(covariances.video)
        text_variance, text = torch.linalg.eigh(covariances.text)
        cross_TV = text.T @ covariances.cross @ video
        draw_VK = torch.randn(
            len(video), min(bases, *cross_TV.shape), dtype=video.dtype, generator=torch.Generator().manual_seed(seed)
        )
        # drawn outside of the axes, whose signs rounding decides, so that these do not matter
        start_VK = video.T @ torch.linalg.qr(draw_VK)[0].to(video.device)
        return Axes(video, text, video_variance, text_variance, cross_TV, start_VK)

    def turned(self, covariances: Covariances) -> Covariances:
        """Others' covariances in these axes."""
        return Covariances(
            self.video.T @ covariances.video @ self.video,
            self.text.T @ covariances.text @ self.text,
            self.text.T @ covariances.cross @ self.video,
        )

    def factors(self, shrinkage: tuple[float, float], iterations: int) -> Factors:
        """EM for K factors; their bases are in these axes.

        Any root of the covariances gives the same scores: that of the axes needs no factorisation of its own.
        """
        video_scale = _whitening(self.video_variance, shrinkage[0])
        text_scale = _whitening(self.text_variance, shrinkage[1])
        m_TV = text_scale[:, None] * self.cross * video_scale
        p_TK, r_K, q_VK, objective = em(m_TV, self.start, iterations)
        return Factors(video_scale[:, None] * q_VK, text_scale[:, None] * p_TK, r_K.clamp(0, HIGHEST), objective)


def em(m_TV: Tensor, start_VK: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EM in its noise-free limit for the strongest K factors of a whitened cross-covariance.

    Returns:
        orthonormal P (D_t, K) and Q (D_v, K) with P^T M Q = diag(r); r (K,), falling; and |M Q|_F before the first
        iteration and after each, which never falls.
    """
    q_VK = start_VK
    image_TK = m_TV @ q_VK
    objective = [torch.linalg.matrix_norm(image_TK)]
    for _ in range(iterations):
        p_TK = torch.linalg.qr(image_TK)[0]  # codes of the texts given the bases of the videos
        q_VK = torch.linalg.qr(m_TV.T @ p_TK)[0]  # and the reverse
        image_TK = m_TV @ q_VK
        objective.append(torch.linalg.matrix_norm(image_TK))
    p_TK, r_K, turn_KK = torch.linalg.svd(image_TK, full_matrices=False)
    return p_TK, r_K, q_VK @ turn_KK.T, torch.stack(objective)


def _whitening(variance: Tensor, shrinkage: float) -> Tensor:
    """1 / root of each shrunk variance; zeros where nothing varies at all."""
    shrunk = variance.clamp_min(0) + shrinkage * variance.clamp_min(0).mean()
    return torch.where(shrunk > 0, shrunk.clamp_min(torch.finfo(shrunk.dtype).tiny).rsqrt(), 0.0)
