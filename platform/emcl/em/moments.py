"""What EM needs to know of rows: sums that add up over blocks of rows and over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all ranks, outside autograd; the same result on every rank."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """What EM needs to know of N rows of width D."""

    gram: Tensor  # (D, D)
    total: Tensor  # (D,)
    count: Tensor  # ()

    @staticmethod
    @torch.no_grad()
    def of(rows: Tensor) -> Moments:
        """Moments of rows (..., D)."""
        flat = rows.detach().float().flatten(0, -2)  # (N, D)
        count = torch.full((), float(len(flat)), device=flat.device)
        return Moments(gram=gram_of(flat), total=flat.sum(0), count=count)

    @staticmethod
    @torch.no_grad()
    def of_directions(rows: Tensor) -> Moments:
        """Moments of the rows' directions; rows that are zero or not finite have none and do not count."""
        flat = rows.detach().float().flatten(0, -2)
        norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)  # (N, 1)
        valid = norm.isfinite() & (norm > 0)
        unit = torch.where(valid, flat / norm, 0.0)
        return Moments(gram=gram_of(unit), total=unit.sum(0), count=valid.sum().float())

    @staticmethod
    def sum(moments: Sequence[Moments], all_reduce: AllReduce | None = None) -> list[Moments]:
        """Sums each of `moments` over all ranks, in one message of the upper triangles."""
        if all_reduce is None:
            return list(moments)
        width = moments[0].gram.shape[0]
        upper = torch.triu_indices(width, width, device=moments[0].gram.device)
        packed = torch.stack([torch.cat([p.gram[upper[0], upper[1]], p.total, p.count[None]]) for p in moments])
        packed = all_reduce(packed)
        sums = []
        for row in packed:
            gram = torch.zeros_like(moments[0].gram)
            gram[upper[0], upper[1]] = row[: upper.shape[1]]
            gram = gram + gram.triu(1).T
            sums.append(Moments(gram=gram, total=row[upper.shape[1] : -1], count=row[-1]))
        return sums

    def __add__(self, other: Moments) -> Moments:
        return Moments(gram=self.gram + other.gram, total=self.total + other.total, count=self.count + other.count)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Full float32 products, whatever the run allows elsewhere: rounding decides the basis of a feature between two."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def gram_of(rows: Tensor, blocks: int = 4) -> Tensor:
    """rows^T rows (D, D); by symmetry only the blocks on and above the diagonal are computed."""
    width = rows.shape[1]
    if rows.is_cuda or width // blocks < 64:  # launches cost more, or too small to gain
        return rows.T @ rows
    size = -(-width // blocks)
    out = rows.new_empty(width, width)
    for first in range(0, width, size):
        last = min(width, first + size)
        strip = rows[:, first:last].T @ rows[:, first:]  # (size, width - first)
        out[first:last, first:] = strip
        out[last:, first:last] = strip[:, size:].T
    return out
