"""R@1 with one sentence a video, averaged over which: it is the mean over every draw, and refuses nothing to score."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from emcl.metrics.choice_recall import choice_recall
from emcl.metrics.retrieval_metrics import retrieval_metrics


def drawn(scores: np.ndarray, owner: np.ndarray) -> tuple[float, float]:
    """Mean R@1 of both directions over every choice of one sentence a video, in any order of the sentences."""
    videos = np.unique(owner)
    choices = [
        retrieval_metrics(scores[list(rows)][:, videos])
        for rows in itertools.product(*(np.flatnonzero(owner == video) for video in videos))
    ]
    ways = ("text_to_video", "video_to_text")
    first, second = (float(np.mean([metrics[way]["R@1"] for metrics in choices])) for way in ways)
    return first, second


@pytest.mark.parametrize(
    "owner",
    [[0, 0, 0, 1, 1, 2, 3, 3], [3, 0, 1, 0, 3, 2, 1, 0], [0, 1, 2, 3], [0, 0, 0, 0], [1, 1, 3, 3, 3]],
    ids=["together", "mixed", "one each", "one video's alone", "videos without a sentence"],
)
@pytest.mark.parametrize("ties", [False, True])
def test_it_is_the_mean_over_every_draw(owner: list[int], ties: bool) -> None:
    rng = np.random.default_rng(len(owner))
    scores = rng.integers(0, 4, (len(owner), 4)).astype(float) if ties else rng.standard_normal((len(owner), 4))
    scores[np.arange(len(owner)), owner] += 0.5
    found = choice_recall(scores, owner)
    wanted = drawn(scores, np.array(owner))
    assert (found.text_to_video.mean(), found.video_to_text.mean()) == pytest.approx(wanted)
    assert found.mean == pytest.approx(sum(wanted) / 2)
    assert len(found.text_to_video) == len(found.video_to_text) == len(set(owner))


def test_many_videos_go_in_blocks_that_change_nothing() -> None:
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 150, 400)
    scores = rng.standard_normal((400, 150)).astype(np.float32)
    scores[np.arange(400), owner] += 2
    whole = choice_recall(scores, owner)
    order = rng.permutation(400)  # the order of the sentences is no fact either
    again = choice_recall(scores[order], owner[order])
    np.testing.assert_allclose(whole.text_to_video, again.text_to_video)
    np.testing.assert_allclose(whole.video_to_text, again.video_to_text)
    assert 20 < whole.mean < 90


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ValueError, match="no text to compare"):
        choice_recall(np.zeros((0, 3)), [])
