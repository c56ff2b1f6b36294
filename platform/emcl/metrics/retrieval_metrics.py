"""Retrieval metrics as pure functions on arrays.

Ties are resolved pessimistically by default: every candidate with the same score as the right one is ranked before it.
So a constant similarity gets the worst possible metrics, and these never depend on the order of rows. `ties="for"`
ranks tied candidates after the right one. `ties="reference"` counts like the published EMCL code, which records a rank
for each tied candidate, so there can be more ranks than queries (1,012 for the 1,000 videos of Cap4Video's matrix).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

RECALLS = (1, 5, 10, 50)
BLOCK = 64
"""Queries per block: small compared with all scores, and small enough to stay in the processor's cache."""
THREADS = min(8, os.cpu_count() or 1)
"""Blocks processed in parallel: NumPy releases the GIL while it counts."""
TIES = ("against", "for", "reference")

Owner = Sequence[int] | NDArray[np.int64]
Blocks = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Query numbers -> their scores with all candidates."""
Result = TypeVar("Result")
Rescore = Callable[[NDArray[Any]], Blocks]
"""Changes a similarity (queries x candidates) before it is ranked (metrics/rescoring.py)."""


class Places(NamedTuple):
    """For each query, the rank of the right candidate: before all tied candidates, and after them."""

    best: NDArray[np.int64]
    worst: NDArray[np.int64]

    def ranks(self, ties: str = "against") -> NDArray[np.int64]:
        """The ranks under one of `TIES`."""
        if ties == "reference":
            return np.concatenate([np.arange(low, high + 1) for low, high in zip(*self, strict=True)])
        return {"against": self.worst, "for": self.best}[ties]


def places_of(scores_QG: ArrayLike | Blocks, right_Q: Owner, *, queries: NDArray[np.int64] | None = None) -> Places:
    """Rank (1 is best) of the right candidate of each query, by counting in blocks without sorting.

    If the right candidate's score is NaN, it is ranked last.

    Args:
        scores_QG: queries x candidates; or a function that returns blocks of them.
        queries: the query numbers to pass to that function, ascending; all if not given.
    """
    blocks = scores_QG if callable(scores_QG) else unchanged(np.asarray(scores_QG))
    right = np.asarray(right_Q)
    queries = np.arange(len(right)) if queries is None else queries

    def ranks_in_block(here: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        scores = blocks(queries[here])
        own = np.take_along_axis(scores, right[here, None], axis=1)
        worst = scores.shape[1] - (scores < own).sum(1)
        return np.where(np.isnan(own[:, 0]), worst, 1 + (scores > own).sum(1)), worst

    block_ranks = [np.empty((2, 0), np.int64), *map(np.stack, in_blocks(ranks_in_block, len(right)))]
    return Places(*np.concatenate(block_ranks, axis=1))


def in_blocks(work: Callable[[slice], Result], count: int) -> Iterator[Result]:
    """Yields `work`'s result for each BLOCK of `count` queries, in order; THREADS blocks run in parallel."""
    slices = [slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(slices), THREADS):  # not all at once, because each result may be large
            yield from pool.map(work, slices[first : first + THREADS])


def ranks_of(scores_QG: ArrayLike | Blocks, right_Q: Owner, *, ties: str = "against") -> NDArray[np.int64]:
    """The ranks of `places_of`."""
    return places_of(scores_QG, right_Q).ranks(ties)


def unchanged(scores_QG: NDArray[Any]) -> Blocks:
    """The scores as they are."""
    return lambda queries: rows(scores_QG, queries)


def rows(scores_QG: NDArray[Any], queries: NDArray[np.int64]) -> NDArray[Any]:
    """The rows of `queries` (ascending); without a copy if they are consecutive."""
    first, last = (int(queries[0]), int(queries[-1])) if len(queries) else (0, -1)
    return scores_QG[first : last + 1] if last - first + 1 == len(queries) else scores_QG[queries]


def text_to_video_places(similarity_QG: ArrayLike, video_of_text: Owner, *, rescore: Rescore = unchanged) -> Places:
    """Each text ranks the videos: (texts,)."""
    return places_of(rescore(np.asarray(similarity_QG)), video_of_text)


def video_to_text_places(similarity_QG: ArrayLike, video_of_text: Owner, *, rescore: Rescore = unchanged) -> Places:
    """Each video ranks the videos' sets of texts; a set's score is that of its best text: (videos,).

    With one text per video this is plain video-to-text retrieval. Videos without a text are left out.
    """
    owner = np.asarray(video_of_text)
    videos, counts = np.unique(owner, return_counts=True)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], videos)
    # maximum over the first texts of all sets, then the second texts, and so on: each step works on whole rows
    later = [(np.flatnonzero(counts > k), order[starts[counts > k] + k]) for k in range(1, counts.max(initial=0))]
    blocks = rescore(np.asarray(similarity_QG).T)

    def of_sets(queries: NDArray[np.int64]) -> NDArray[Any]:
        scores = blocks(queries).T  # each text's scores are contiguous
        best = scores[order[starts]]
        for sets, texts in later:
            best[sets] = np.maximum(best[sets], scores[texts])
        return best.T

    return places_of(of_sets, np.arange(len(videos)), queries=videos)


def text_to_video_ranks(
    similarity_QG: ArrayLike, video_of_text: Owner, *, ties: str = "against", rescore: Rescore = unchanged
) -> NDArray[np.int64]:
    """The ranks of `text_to_video_places`."""
    return text_to_video_places(similarity_QG, video_of_text, rescore=rescore).ranks(ties)


def video_to_text_ranks(
    similarity_QG: ArrayLike, video_of_text: Owner, *, ties: str = "against", rescore: Rescore = unchanged
) -> NDArray[np.int64]:
    """The ranks of `video_to_text_places`."""
    return video_to_text_places(similarity_QG, video_of_text, rescore=rescore).ranks(ties)


def video_to_any_text_ranks(similarity_QG: ArrayLike, video_of_text: Owner) -> NDArray[np.int64]:
    """Each video ranks all texts one by one; its rank is that of its best own text: (videos with texts,).

    Another way to count several captions, used by some published video-to-text figures: a video with many captions
    that all score high takes many ranks.
    """
    turned, owner = np.asarray(similarity_QG).T, np.asarray(video_of_text)
    videos = np.unique(owner)

    def ranks(here: slice) -> NDArray[np.int64]:
        scores, own = rows(turned, videos[here]), owner == videos[here, None]
        best = np.where(own, scores, -np.inf).max(1, keepdims=True)
        return 1 + (~(scores < best) & ~own).sum(1)

    return np.concatenate([np.empty(0, np.int64), *in_blocks(ranks, len(videos))])


def summarize(ranks: ArrayLike) -> dict[str, float]:
    """R@1, 5, 10, 50 in per cent, median (MdR) and mean (MnR) rank."""
    ranks = np.asarray(ranks)
    if ranks.size == 0:
        raise ValueError("no query to summarise")
    recalls = {f"R@{k}": float(100 * (ranks <= k).mean()) for k in RECALLS}
    return {**recalls, "MdR": float(np.median(ranks)), "MnR": float(ranks.mean())}


def retrieval_metrics(
    similarity_QG: ArrayLike,
    video_of_text: Owner | None = None,
    *,
    ties: str = "against",
    rescore: tuple[Rescore, Rescore] = (unchanged, unchanged),
) -> dict[str, dict[str, float]]:
    """Metrics of both directions of a similarity of texts (rows) and videos (columns).

    Args:
        similarity_QG: (texts, videos); higher is more alike.
        video_of_text: (texts,) each text's column; column i for row i if not given.
        rescore: for text-to-video, and for video-to-text.
    """
    owner = np.arange(np.shape(similarity_QG)[0]) if video_of_text is None else np.asarray(video_of_text)
    by_text, by_video = rescore
    return {
        "text_to_video": summarize(text_to_video_ranks(similarity_QG, owner, ties=ties, rescore=by_text)),
        "video_to_text": summarize(video_to_text_ranks(similarity_QG, owner, ties=ties, rescore=by_video)),
    }


def protocol_metrics(
    similarity_QG: ArrayLike, video_of_text: Owner
) -> tuple[dict[str, dict[str, float]], dict[str, NDArray[np.int64]]]:
    """`retrieval_metrics`, plus other ways to count if their result differs; and each direction's ranks.

    `both/rsum` is R@1 + R@5 + R@10 of both directions, at most 600. `video_to_any_text` ranks all captions of a video
    one by one. `..._as_published` counts ties like the published EMCL code.
    """
    ranks_by_way = {
        "text_to_video": text_to_video_places(similarity_QG, video_of_text),
        "video_to_text": video_to_text_places(similarity_QG, video_of_text),
    }
    metrics = {way: summarize(both.worst) for way, both in ranks_by_way.items()}
    for way, both in ranks_by_way.items():
        published = summarize(both.ranks("reference"))
        if published != metrics[way]:
            metrics[f"{way}_as_published"] = published
    if len(np.unique(video_of_text)) < len(np.asarray(video_of_text)):
        metrics["video_to_any_text"] = summarize(video_to_any_text_ranks(similarity_QG, video_of_text))
    metrics["both"] = {"rsum": rsum(metrics)}
    return metrics, {way: both.worst for way, both in ranks_by_way.items()}


def rsum(metrics: dict[str, dict[str, float]]) -> float:
    """R@1 + R@5 + R@10 of both directions, at most 600."""
    return sum(metrics[way][f"R@{k}"] for way in ("text_to_video", "video_to_text") for k in (1, 5, 10))
