"""What may be done to a similarity before it is ranked: the dual softmax, and normalisation by a query bank.

Legend: Q test texts, G test videos, B queries of a bank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emcl.metrics.retrieval import BLOCK, summarize, text_to_video_ranks, video_to_text_ranks

Owner = Sequence[int] | NDArray[np.int64]


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
    similarity_QG: ArrayLike, video_of_text: Owner | None = None, *, temperature: float = 0.01
) -> dict[str, dict[str, float]]:
    """Both directions with the dual softmax; any number of texts a video."""
    owner = np.arange(np.shape(similarity_QG)[0]) if video_of_text is None else np.asarray(video_of_text)
    by_text = dual_softmax(similarity_QG, temperature=temperature, over="texts")
    by_video = dual_softmax(similarity_QG, temperature=temperature, over="videos")
    return {
        "text_to_video": summarize(text_to_video_ranks(by_text, owner)),
        "video_to_text": summarize(video_to_text_ranks(by_video, owner)),
    }


def query_bank(similarity_QG: ArrayLike, bank_BG: ArrayLike, *, temperature: float = 0.05) -> NDArray[np.float64]:
    """QB-Norm's dynamic inverted softmax (Bogolin et al., CVPR 2022), each query by itself.

    A video that is the best of some bank query attracts too many. A test query whose best video is such a one has its
    scores divided by what the bank gives each video; others stay as they are.

    Args:
        similarity_QG: test queries x gallery.
        bank_BG: queries of the training set x the same gallery.
        temperature: of the softmax, 1 / beta.
    """
    similarity, bank = (np.asarray(scores, dtype=np.float64) for scores in (similarity_QG, bank_BG))
    active = np.zeros(similarity.shape[1], bool)
    highest = bank.max(0)
    total = np.zeros(similarity.shape[1])
    for first in range(0, len(bank), BLOCK):
        part = bank[first : first + BLOCK]
        active[part.argmax(1)] = True
        total += np.exp((part - highest) / temperature).sum(0)
    level = highest + temperature * np.log(total)  # of each video, in the units of a similarity
    hub = active[similarity.argmax(1)]
    # a monotone map of a query's scores moves no rank, so the logarithm of the published ratio does
    return np.where(hub[:, None], similarity - level, similarity)


def query_bank_metrics(
    similarity_QG: ArrayLike,
    text_bank_BG: ArrayLike,
    video_bank_QB: ArrayLike | None = None,
    video_of_text: Owner | None = None,
    *,
    temperature: float = 0.05,
) -> dict[str, dict[str, float]]:
    """Text-to-video by a bank of training texts; video-to-text, with a bank of training videos.

    Args:
        text_bank_BG: training texts x test videos.
        video_bank_QB: test texts x training videos.
    """
    similarity = np.asarray(similarity_QG)
    owner = np.arange(len(similarity)) if video_of_text is None else np.asarray(video_of_text)
    found = {
        "text_to_video": summarize(
            text_to_video_ranks(query_bank(similarity, text_bank_BG, temperature=temperature), owner)
        )
    }
    if video_bank_QB is not None:
        by_video = query_bank(similarity.T, np.asarray(video_bank_QB).T, temperature=temperature).T
        found["video_to_text"] = summarize(video_to_text_ranks(by_video, owner))
    return found
