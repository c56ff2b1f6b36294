"""Means over seeds, and a paired bootstrap over queries and seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ablation_models import Measured

DRAWS = 10_000


@dataclass(frozen=True)
class Difference:
    """Difference in R@1 (mean of both directions), in percentage points."""

    mean: float
    low: float
    high: float
    """Upper bound; `low` and `high` enclose 95%."""
    p: float
    """Two-sided p-value."""


def hits(measured: Measured) -> NDArray[np.float64]:
    """(videos,) R@1 of each video in points: mean of both directions, each averaged over its queries."""
    text_hits = (measured.text_to_video == 1).astype(float)
    texts = np.bincount(measured.owner)
    by_text = np.bincount(measured.owner, text_hits)[texts > 0] / texts[texts > 0]
    return 50 * (by_text + (measured.video_to_text == 1))


def paired_bootstrap(ours: Sequence[Measured], theirs: Sequence[Measured], *, seed: int = 0) -> Difference:
    """Resamples seeds and videos (with all their texts), the same ones for both sides."""
    difference = np.stack([hits(a) - hits(b) for a, b in zip(ours, theirs, strict=True)])  # (seeds, videos)
    seeds, videos = difference.shape
    rng = np.random.default_rng(seed)
    of_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), DRAWS)  # (draws, seeds)
    of_video = rng.multinomial(videos, np.full(videos, 1 / videos), DRAWS)
    drawn = ((of_seed @ difference) * of_video).sum(1) / (seeds * videos)
    below, above = (drawn <= 0).mean(), (drawn >= 0).mean()
    low, high = np.percentile(drawn, [2.5, 97.5])
    p = min(1.0, 2 * max(min(below, above), 1 / DRAWS))
    return Difference(float(difference.mean()), float(low), float(high), p)
