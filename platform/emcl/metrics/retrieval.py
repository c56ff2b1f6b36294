"""Retrieval metrics as pure functions on arrays.

Ties are resolved pessimistically by default: every candidate that scores as high as the right one is ranked before it.
So a constant similarity scores as badly as can be, and the metric never depends on the order of rows. `ties="for"`
ranks them after it. `ties="reference"` counts as the published EMCL code does, which puts down a rank for each of the
candidates that tie: it has more ranks than queries then (1,012 for the 1,000 videos of Cap4Video's matrix).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RECALLS = (1, 5, 10, 50)
BLOCK = 512
"""Queries at once, so that what is counted needs little memory beside the scores."""


TIES = ("against", "for", "reference")


def ranks_of(
    scores_QG: ArrayLike, right_Q: Sequence[int] | NDArray[np.int64], *, ties: str = "against"
) -> NDArray[np.int64]:
    """Rank (1 is best) of the right candidate of each query; counting in blocks, no sorting.

    A score that is not a number ranks a query last.
    """
    scores, right = np.asarray(scores_QG), np.asarray(right_Q)
    best, worst = (np.empty(len(scores), np.int64) for _ in range(2))
    for first in range(0, len(scores), BLOCK):
        part = scores[first : first + BLOCK]
        own = np.take_along_axis(part, right[first : first + BLOCK, None], axis=1)
        worst[first : first + BLOCK] = part.shape[1] - (part < own).sum(1)
        if ties != "against":
            best[first : first + BLOCK] = 1 + (part > own).sum(1)
    if ties == "against":
        return worst
    best = np.where(np.isnan(np.take_along_axis(scores, right[:, None], axis=1)[:, 0]), worst, best)
    if ties == "for":
        return best
    return np.concatenate([np.arange(low, high + 1) for low, high in zip(best, worst, strict=True)])


def text_to_video_ranks(
    similarity_QG: ArrayLike, video_of_text: Sequence[int] | NDArray[np.int64], *, ties: str = "against"
) -> NDArray[np.int64]:
    """Each text ranks the videos: (texts,)."""
    return ranks_of(similarity_QG, video_of_text, ties=ties)


def video_to_text_ranks(
    similarity_QG: ArrayLike, video_of_text: Sequence[int] | NDArray[np.int64], *, ties: str = "against"
) -> NDArray[np.int64]:
    """Each video ranks the videos' sets of texts, a set scoring as its best text: (videos,).

    With one text a video this is plain video-to-text retrieval. Videos without a text are left out.
    """
    similarity, owner = np.asarray(similarity_QG), np.asarray(video_of_text)
    videos, group = np.unique(owner, return_inverse=True)
    best = np.full((len(videos), similarity.shape[1]), -np.inf, similarity.dtype)
    np.maximum.at(best, group, similarity)  # (videos with texts, videos)
    return ranks_of(best[:, videos].T, np.arange(len(videos)), ties=ties)


def video_to_any_text_ranks(
    similarity_QG: ArrayLike, video_of_text: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Each video ranks all texts one by one; its rank is that of its best own text: (videos with texts,).

    Another way to count several captions, which some published video-to-text figures use: a video with many captions
    that all score high takes many places.
    """
    similarity, owner = np.asarray(similarity_QG), np.asarray(video_of_text)
    ranks = []
    for video in np.unique(owner):
        own = owner == video
        best = similarity[own, video].max()
        ranks.append(1 + int((~(similarity[~own, video] < best)).sum()))
    return np.array(ranks)


def summarize(ranks: ArrayLike) -> dict[str, float]:
    """R@1, 5, 10, 50 in per cent, median (MdR) and mean (MnR) rank."""
    ranks = np.asarray(ranks)
    if ranks.size == 0:
        raise ValueError("no query to summarise")
    recalls = {f"R@{k}": float(100 * (ranks <= k).mean()) for k in RECALLS}
    return {**recalls, "MdR": float(np.median(ranks)), "MnR": float(ranks.mean())}


def retrieval_metrics(
    similarity_QG: ArrayLike,
    video_of_text: Sequence[int] | NDArray[np.int64] | None = None,
    *,
    ties: str = "against",
) -> dict[str, dict[str, float]]:
    """Both directions of a similarity of texts (rows) and videos (columns).

    Args:
        similarity_QG: (texts, videos); higher is more alike.
        video_of_text: (texts,) each text's own column; row i's is column i where not given.
    """
    owner = np.arange(np.shape(similarity_QG)[0]) if video_of_text is None else np.asarray(video_of_text)
    return {
        "text_to_video": summarize(text_to_video_ranks(similarity_QG, owner, ties=ties)),
        "video_to_text": summarize(video_to_text_ranks(similarity_QG, owner, ties=ties)),
    }


def rsum(both: dict[str, dict[str, float]]) -> float:
    """R@1 + R@5 + R@10 of both directions, at most 600."""
    return sum(values[f"R@{k}"] for values in both.values() for k in (1, 5, 10))
