"""Retrieval metrics as pure functions on arrays.

Ties are resolved pessimistically: every candidate that scores as high as the right one is ranked before it. So a
constant similarity scores as badly as can be, and the metric never depends on the order of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

RECALLS = (1, 5, 10, 50)


def ranks_of(scores_QG: ArrayLike, right_Q: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Rank (1 is best) of the right candidate of each query; one pass of counting, no sorting.

    A score that is not a number ranks a query last.
    """
    scores = np.asarray(scores_QG)
    own = np.take_along_axis(scores, np.asarray(right_Q)[:, None], axis=1)
    return scores.shape[1] - (scores < own).sum(1)


def text_to_video_ranks(
    similarity_QG: ArrayLike, video_of_text: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Each text ranks the videos: (texts,)."""
    return ranks_of(similarity_QG, video_of_text)


def video_to_text_ranks(
    similarity_QG: ArrayLike, video_of_text: Sequence[int] | NDArray[np.int64]
) -> NDArray[np.int64]:
    """Each video ranks the videos' sets of texts, a set scoring as its best text: (videos,).

    With one text a video this is plain video-to-text retrieval. Videos without a text are left out.
    """
    similarity, owner = np.asarray(similarity_QG), np.asarray(video_of_text)
    videos, group = np.unique(owner, return_inverse=True)
    best = np.full((len(videos), similarity.shape[1]), -np.inf, similarity.dtype)
    np.maximum.at(best, group, similarity)  # (videos with texts, videos)
    return ranks_of(best[:, videos].T, np.arange(len(videos)))


def summarize(ranks: ArrayLike) -> dict[str, float]:
    """R@1, 5, 10, 50 in per cent, median (MdR) and mean (MnR) rank."""
    ranks = np.asarray(ranks)
    if ranks.size == 0:
        raise ValueError("no query to summarise")
    recalls = {f"R@{k}": float(100 * (ranks <= k).mean()) for k in RECALLS}
    return {**recalls, "MdR": float(np.median(ranks)), "MnR": float(ranks.mean())}


def retrieval_metrics(
    similarity_QG: ArrayLike, video_of_text: Sequence[int] | NDArray[np.int64] | None = None
) -> dict[str, dict[str, float]]:
    """Both directions of a similarity of texts (rows) and videos (columns).

    Args:
        similarity_QG: (texts, videos); higher is more alike.
        video_of_text: (texts,) each text's own column; row i's is column i where not given.
    """
    owner = np.arange(np.shape(similarity_QG)[0]) if video_of_text is None else np.asarray(video_of_text)
    return {
        "text_to_video": summarize(text_to_video_ranks(similarity_QG, owner)),
        "video_to_text": summarize(video_to_text_ranks(similarity_QG, owner)),
    }


def dual_softmax(similarity_QG: ArrayLike, *, temperature: float = 0.01, over: str = "texts") -> NDArray[np.float64]:
    """Similarity times its softmax along the other side and the number of texts (EMCL-Net++'s DSL).

    `over="texts"` for text-to-video, `over="videos"` for video-to-text. Transductive: every score depends on all
    queries of the test set.
    """
    similarity = np.asarray(similarity_QG, dtype=np.float64)
    axis = {"texts": 0, "videos": 1}[over]
    scaled = similarity / temperature
    weights = np.exp(scaled - scaled.max(axis, keepdims=True))
    return similarity * weights / weights.sum(axis, keepdims=True) * similarity.shape[axis]


def dual_softmax_metrics(
    similarity_QG: ArrayLike,
    video_of_text: Sequence[int] | NDArray[np.int64] | None = None,
    *,
    temperature: float = 0.01,
) -> dict[str, dict[str, float]]:
    """Both directions with the dual softmax; any number of texts a video."""
    owner = np.arange(np.shape(similarity_QG)[0]) if video_of_text is None else np.asarray(video_of_text)
    by_text = dual_softmax(similarity_QG, temperature=temperature, over="texts")
    by_video = dual_softmax(similarity_QG, temperature=temperature, over="videos")
    return {
        "text_to_video": summarize(text_to_video_ranks(by_text, owner)),
        "video_to_text": summarize(video_to_text_ranks(by_video, owner)),
    }
