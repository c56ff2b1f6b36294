"""Expectation-Maximization Contrastive Learning: the decomposition and its layer.

This file needs torch alone and nothing else of this project, so it can be copied into any code base.

Legend: N feature rows, D width, K bases.

The published iterations (Jin et al., NeurIPS 2022, section 3.2, with the reference code's details) are,
for rows X (N, D), starting from M[n, k] = mu[k]::

    Z = softmax_k(X^T M / temperature)        (D, K)  E-step
    Z[:, k] /= 1e-6 + sum_d Z[d, k]
    M = X Z                                   (N, K)  M-step
    M[:, k] /= 1e-6 + ||M[:, k]||
    X_hat = M Z^T,   output = X + beta X_hat,   mu <- momentum mu + (1 - momentum) mean_n M[n, :]

Rows enter these formulas only through two sums, G = X^T X and s = sum_n X[n]:

    X^T M = G Z / (1e-6 + ||M||)   with   ||M[:, k]||^2 = Z[:, k]^T G Z[:, k],   X^T M_0 = s mu^T,

so the same numbers follow from (G, s, N), which we call the moments. Computing them takes one pass over
the rows however many iterations follow; they add over blocks and over ranks; and the result is a linear
map of a row, X_hat = X (Z diag(1 / norm) Z^T), which is applied to any rows, a block at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, outside autograd; the same result on every rank."""

_EPSILON = 1e-6


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What EM needs to know of N rows of width D."""

    gram: Tensor  # (D, D)
    total: Tensor  # (D,)
    count: Tensor  # ()

    @staticmethod
    @torch.no_grad()
    def of(*blocks: Tensor, all_reduce: AllReduce | None = None) -> Moments:
        """Moments of all rows of `blocks`, each (..., D), and of the other ranks' where `all_reduce` is given."""
        rows = [block.detach().float().flatten(0, -2) for block in blocks]  # each (n, D)
        width = rows[0].shape[1]
        packed = torch.zeros(width + 2, width, device=rows[0].device)
        for block in rows:
            packed[:width].addmm_(block.T, block)
            packed[width] += block.sum(0)
            packed[width + 1, 0] += len(block)
        if all_reduce is not None:
            packed = all_reduce(packed)  # one message for the three sums
        return Moments(gram=packed[:width], total=packed[width], count=packed[width + 1, 0])


@torch.no_grad()
def fit_reference(moments: Moments, mu: Tensor, *, iterations: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The published EM, from moments.

    Args:
        moments: of the rows X (N, D).
        mu: (K,) the scalar that each basis starts from.
        iterations: T; at least 1.
        temperature: lambda of the E-step's softmax.

    Returns:
        projection (D, D) with X_hat = X @ projection, and the mean code (K,) that moves `mu` in training.
    """
    cross = moments.total[:, None] * mu[None, :]  # X^T M, (D, K)
    for _ in range(iterations):
        bases = torch.softmax(cross / temperature, dim=1)  # Z, (D, K)
        bases = bases / (_EPSILON + bases.sum(0))
        unscaled = moments.gram @ bases  # X^T X Z, (D, K)
        norm = _EPSILON + (bases * unscaled).sum(0).clamp_min(0).sqrt()  # (K,)
        cross = unscaled / norm
    projection = (bases / norm) @ bases.T  # (D, D)
    mean_code = (moments.total @ bases) / norm / moments.count.clamp_min(1)  # (K,)
    return projection, mean_code


class EMCL(nn.Module):
    """The EMCL layer: adds to every feature row its reconstruction from K bases that EM finds.

    The state is one scalar a basis (`mu`), a float32 buffer whatever precision the model is cast to.
    It moves in training mode only, as an exponential average.

    Args:
        bases: K.
        iterations: T.
        temperature: lambda.
        beta: weight of the reconstruction.
        momentum: alpha of the moving average of `mu`.
        variant: `reference`, the published behaviour.
        seed: of the initial signs of `mu`.
    """

    VARIANTS = ("reference",)

    def __init__(
        self,
        *,
        bases: int = 32,
        iterations: int = 9,
        temperature: float = 1.0,
        beta: float = 3.0,
        momentum: float = 0.9,
        variant: str = "reference",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if variant not in self.VARIANTS:
            raise ValueError(f"emcl variant {variant!r} is none of {', '.join(self.VARIANTS)}")
        if bases < 1 or iterations < 1 or temperature <= 0:
            raise ValueError("emcl wants at least 1 basis, 1 iteration and a temperature above 0")
        self.iterations, self.temperature = iterations, temperature
        self.beta, self.momentum = beta, momentum
        # The published initialisation normalises along an axis of length 1, which leaves the signs.
        signs = torch.randn(bases, generator=torch.Generator().manual_seed(seed)).sign()
        self.mu: Tensor
        self.register_buffer("mu", signs)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        mu = self.mu
        super()._apply(fn, recurse)
        if self.mu.is_floating_point() and self.mu.dtype != torch.float32:  # .half() and .bfloat16() would round it
            self.mu = mu.to(self.mu.device)
        return self

    @torch.no_grad()
    def fit(self, *blocks: Tensor, all_reduce: AllReduce | None = None) -> Tensor:
        """EM on the rows of all blocks (and ranks): the (D, D) map with X_hat = X @ map. Moves `mu` in training."""
        with torch.autocast(blocks[0].device.type, enabled=False):  # sums over many rows want float32
            moments = Moments.of(*blocks, all_reduce=all_reduce)
            projection, mean_code = fit_reference(
                moments, self.mu, iterations=self.iterations, temperature=self.temperature
            )
        if self.training:
            self.mu.mul_(self.momentum).add_(mean_code, alpha=1 - self.momentum)
        return projection

    def apply_projection(self, rows: Tensor, projection: Tensor) -> Tensor:
        """rows (..., D) plus beta times their reconstruction, which is a constant to autograd, as published."""
        reconstruction = rows.detach().float() @ projection
        return rows + (self.beta * reconstruction).to(rows.dtype)

    def forward(self, *blocks: Tensor, all_reduce: AllReduce | None = None) -> tuple[Tensor, ...]:
        """Fits EM on all blocks together (video rows and text rows, each (..., D)) and returns them corrected."""
        projection = self.fit(*blocks, all_reduce=all_reduce)
        return tuple(self.apply_projection(block, projection) for block in blocks)
