"""Confidence intervals over test videos by the percentile bootstrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAMPLES = 2000


def interval(
    values: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bounds of the mean of `values` over test sets resampled with replacement.

    Args:
        values: one per query.
        clusters: each query's cluster, for example its video; clusters are resampled as a whole. Without it, queries
            are resampled one by one.
    """
    values_Q = np.asarray(values, np.float64)
    if values_Q.size == 0:
        raise ValueError("no value to resample")
    groups = np.arange(len(values_Q)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = int(groups.max()) + 1
    total = np.bincount(groups, weights=values_Q, minlength=count).astype(np.float64)
    size = np.bincount(groups, minlength=count).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = [_mean(total, size, rng.integers(0, count, count)) for _ in range(SAMPLES)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_of(
    sums: ArrayLike, measure: Callable[[NDArray[np.float64]], float], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bounds of a corpus-level measure, computed from the sum over videos of `sums` (videos, statistics)."""
    sums_VN = np.asarray(sums, np.float64)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(sums_VN), len(sums_VN)) for _ in range(SAMPLES))
    low, high = np.quantile([measure(sums_VN[rows].sum(0)) for rows in drawn], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(total: NDArray[np.floating], size: NDArray[np.floating], drawn: NDArray[np.integer]) -> float:
    return float(total[drawn].sum() / size[drawn].sum())
