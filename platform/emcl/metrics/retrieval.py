"""Retrieval metrics as pure functions on arrays.

Ties are resolved pessimistically by default: every candidate that scores as high as the right one is ranked before it.
So a constant similarity scores as badly as can be, and the metric never depends on the order of rows. `ties="for"`
ranks them after it. `ties="reference"` counts as the published EMCL code does, which puts down a rank for each of the
candidates that tie: it has more ranks than queries then (1,012 for the 1,000 videos of Cap4Video's matrix).
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
"""Queries at once: little memory beside the scores, and what is done to a block finds it in the processor's cache."""
THREADS = min(8, os.cpu_count() or 1)
"""Blocks at once: NumPy lets other threads run while it counts."""
TIES = ("against", "for", "reference")

Owner = Sequence[int] | NDArray[np.int64]
Blocks = Callable[[NDArray[np.int64]], NDArray[Any]]
"""Scores of some queries, named by their numbers, with all candidates."""
Result = TypeVar("Result")
Rescore = Callable[[NDArray[Any]], Blocks]
"""What is done to a similarity (queries x candidates) before it is ranked (metrics/rescoring.py)."""


class Places(NamedTuple):
    """Of each query, the rank of the right candidate: before all that tie with it, and after them."""

    best: NDArray[np.int64]
    worst: NDArray[np.int64]

    def ranks(self, ties: str = "against") -> NDArray[np.int64]:
        """By one of `TIES`."""
        if ties == "reference":
            return np.concatenate([np.arange(low, high + 1) for low, high in zip(*self, strict=True)])
        return {"against": self.worst, "for": self.best}[ties]


def places_of(scores_QG: ArrayLike | Blocks, right_Q: Owner, *, queries: NDArray[np.int64] | None = None) -> Places:
    """Places (1 is best) of the right candidate of each query; counting in blocks, no sorting.

    A score that is not a number places a query last.

    Args:
        scores_QG: queries x candidates; or a function that gives them block by block.
        queries: the numbers by which it is asked, rising; all where not given.
    """
    blocks = scores_QG if callable(scores_QG) else unchanged(np.asarray(scores_QG))
    right = np.asarray(right_Q)
    queries = np.arange(len(right)) if queries is None else queries

    def places(here: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        part = blocks(queries[here])
        own = np.take_along_axis(part, right[here, None], axis=1)
        worst = part.shape[1] - (part < own).sum(1)
        return np.where(np.isnan(own[:, 0]), worst, 1 + (part > own).sum(1)), worst

    found = [np.empty((2, 0), np.int64), *map(np.stack, in_blocks(places, len(right)))]
    return Places(*np.concatenate(found, axis=1))


def in_blocks(work: Callable[[slice], Result], count: int) -> Iterator[Result]:
    """What `work` gives for each BLOCK of `count` queries, in order; some at once, in threads."""
    slices = [slice(first, min(first + BLOCK, count)) for first in range(0, count, BLOCK)]
    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(slices), THREADS):  # not all together, as each one's result may be large
            yield from pool.map(work, slices[first : first + THREADS])


def ranks_of(scores_QG: ArrayLike | Blocks, right_Q: Owner, *, ties: str = "against") -> NDArray[np.int64]:
    """The ranks of `places_of`."""
    return places_of(scores_QG, right_Q).ranks(ties)


def unchanged(scores_QG: NDArray[Any]) -> Blocks:
    """The scores as they are."""
    return lambda queries: rows(scores_QG, queries)


def rows(scores_QG: NDArray[Any], queries: NDArray[np.int64]) -> NDArray[Any]:
    """Those of `queries`, which rise; without a copy where none in between is left out."""
    first, last = (int(queries[0]), int(queries[-1])) if len(queries) else (0, -1)
    return scores_QG[first : last + 1] if last - first + 1 == len(queries) else scores_QG[queries]


def text_to_video_places(similarity_QG: ArrayLike, video_of_text: Owner, *, rescore: Rescore = unchanged) -> Places:
    """Each text ranks the videos: (texts,)."""
    return places_of(rescore(np.asarray(similarity_QG)), video_of_text)


def video_to_text_places(similarity_QG: ArrayLike, video_of_text: Owner, *, rescore: Rescore = unchanged) -> Places:
    """Each video ranks the videos' sets of texts, a set scoring as its best text: (videos,).

    With one text a video this is plain video-to-text retrieval. Videos without a text are left out.
    """
    owner = np.asarray(video_of_text)
    videos, counts = np.unique(owner, return_counts=True)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], videos)
    # the first texts of all sets, then the second ones of those that have two, ..: whole rows of scores at a time
    later = [(np.flatnonzero(counts > k), order[starts[counts > k] + k]) for k in range(1, counts.max(initial=0))]
    blocks = rescore(np.asarray(similarity_QG).T)

    def of_sets(queries: NDArray[np.int64]) -> NDArray[Any]:
        scores = blocks(queries).T  # a text's scores lie side by side
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

    Another way to count several captions, which some published video-to-text figures use: a video with many captions
    that all score high takes many places.
    """
    turned, owner = np.asarray(similarity_QG).T, np.asarray(video_of_text)
    videos = np.unique(owner)

    def ranks(here: slice) -> NDArray[np.int64]:
        part, own = rows(turned, videos[here]), owner == videos[here, None]
        best = np.where(own, part, -np.inf).max(1, keepdims=True)
        return 1 + (~(part < best) & ~own).sum(1)

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
    """Both directions of a similarity of texts (rows) and videos (columns).

    Args:
        similarity_QG: (texts, videos); higher is more alike.
        video_of_text: (texts,) each text's own column; row i's is column i where not given.
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
    """`retrieval_metrics` with the other ways to count where they say something else; and each direction's ranks.

    `both/rsum` is R@1 + R@5 + R@10 of both directions, at most 600. `video_to_any_text`: several captions a video,
    one by one. `..._as_published`: ties as the published EMCL code counts them.
    """
    places = {
        "text_to_video": text_to_video_places(similarity_QG, video_of_text),
        "video_to_text": video_to_text_places(similarity_QG, video_of_text),
    }
    found = {way: summarize(both.worst) for way, both in places.items()}
    for way, both in places.items():
        published = summarize(both.ranks("reference"))
        if published != found[way]:
            found[f"{way}_as_published"] = published
    if len(np.unique(video_of_text)) < len(np.asarray(video_of_text)):
        found["video_to_any_text"] = summarize(video_to_any_text_ranks(similarity_QG, video_of_text))
    found["both"] = {"rsum": rsum(found)}
    return found, {way: both.worst for way, both in places.items()}


def rsum(found: dict[str, dict[str, float]]) -> float:
    """R@1 + R@5 + R@10 of both directions, at most 600."""
    return sum(found[way][f"R@{k}"] for way in ("text_to_video", "video_to_text") for k in (1, 5, 10))
