"""How far a mean would move with other test videos: the percentile bootstrap."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAMPLES = 2000


def interval(
    values: ArrayLike, clusters: ArrayLike | None = None, *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bounds of the mean of `values` over test sets drawn with replacement.

    Args:
        values: one of each query.
        clusters: what is drawn, by its number: the video of each query, as the queries of one video go together. Each
            query by itself where not given.
    """
    found = np.asarray(values, np.float64)
    if found.size == 0:
        raise ValueError("no value to resample")
    groups = np.arange(len(found)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    count = int(groups.max()) + 1
    total = np.bincount(groups, weights=found, minlength=count).astype(np.float64)
    size = np.bincount(groups, minlength=count).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = [_mean(total, size, rng.integers(0, count, count)) for _ in range(SAMPLES)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def interval_of(
    sums: ArrayLike, measure: Callable[[NDArray[np.float64]], float], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Bounds of a measure of a whole corpus: of the sum of each video's numbers (videos, numbers)."""
    found = np.asarray(sums, np.float64)
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(found), len(found)) for _ in range(SAMPLES))
    low, high = np.quantile([measure(found[rows].sum(0)) for rows in drawn], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean(total: NDArray[np.floating], size: NDArray[np.floating], drawn: NDArray[np.integer]) -> float:
    return float(total[drawn].sum() / size[drawn].sum())
