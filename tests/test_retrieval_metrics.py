"""Recall and ranks equal the published reference's, on its golden numbers and on a real similarity matrix."""

from __future__ import annotations

import json

import numpy as np
import pytest

from conftest import shared
from emcl.metrics.retrieval import (
    dual_softmax_metrics,
    ranks_of,
    retrieval_metrics,
    text_to_video_ranks,
    video_to_text_ranks,
)

NAMES = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "R50": "R@50", "MedianR": "MdR", "MeanR": "MnR"}


def assert_equal(ours: dict[str, float], reference: dict[str, float]) -> None:
    for name, value in reference.items():
        if name in NAMES:
            assert ours[NAMES[name]] == pytest.approx(value, abs=1e-5), name


@pytest.fixture(scope="module")
def golden() -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    arrays = np.load(shared("golden/metrics_reference.npz"))
    return dict(arrays), json.loads(shared("golden/metrics_reference.json").read_text())


def test_one_text_a_video_equals_the_reference(golden: tuple) -> None:
    arrays, numbers = golden
    ours = retrieval_metrics(arrays["similarity"])
    assert_equal(ours["text_to_video"], numbers["t2v"])
    assert_equal(ours["video_to_text"], numbers["v2t"])


def test_dual_softmax_equals_the_reference(golden: tuple) -> None:
    arrays, numbers = golden
    ours = dual_softmax_metrics(arrays["similarity"], temperature=0.01)
    assert_equal(ours["text_to_video"], numbers["dsl_t2v"])
    assert_equal(ours["video_to_text"], numbers["dsl_v2t"])


def test_several_texts_a_video_equal_the_reference(golden: tuple) -> None:
    arrays, numbers = golden
    owner = arrays["multi_video_of_text"]
    ours = retrieval_metrics(arrays["multi_similarity"], owner)
    # the reference publishes these in single precision
    assert_equal(ours["text_to_video"], numbers["multi_t2v"])
    assert_equal(ours["video_to_text"], numbers["multi_v2t"])
    spread = text_to_video_ranks(arrays["multi_similarity"], owner).std()
    assert spread == pytest.approx(numbers["multi_t2v"]["Std_Rank"], abs=1e-5)


def test_the_real_cap4video_matrix() -> None:
    matrix = np.load(shared("data/similarity/cap4video_msrvtt_1ka.npy"))
    numbers = json.loads(shared("data/similarity/cap4video_msrvtt_1ka.json").read_text())
    assert_equal(retrieval_metrics(matrix)["text_to_video"], numbers["t2v"])
    assert_equal(dual_softmax_metrics(matrix)["text_to_video"], numbers["dsl_t2v"])
    assert retrieval_metrics(matrix)["video_to_text"]["R@1"] == pytest.approx(45.6)  # of 1,000, ties against


def test_a_constant_similarity_scores_as_badly_as_can_be() -> None:
    for direction in retrieval_metrics(np.zeros((60, 60))).values():
        assert direction["R@1"] == direction["R@50"] == 0
        assert direction["MdR"] == direction["MnR"] == 60


def test_ties_count_against_and_not_a_number_ranks_last() -> None:
    scores = np.array([[0.5, 0.5, 0.1], [0.9, 0.2, 0.2], [0.3, 0.2, np.nan]])
    assert ranks_of(scores, [0, 0, 2]).tolist() == [2, 1, 3]


def test_hand_computed_ranks_with_several_captions() -> None:
    similarity = np.array([[0.9, 0.1], [0.2, 0.3], [0.6, 0.7], [0.8, 0.4]])  # 4 texts, 2 videos
    owner = [0, 0, 1, 1]
    assert text_to_video_ranks(similarity, owner).tolist() == [1, 2, 1, 2]
    # video 0: its best text 0.9 against 0.8 of video 1's; video 1: 0.7 against 0.3
    assert video_to_text_ranks(similarity, owner).tolist() == [1, 1]


def test_metrics_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    similarity, owner = rng.integers(0, 9, (80, 20)).astype(float), rng.integers(0, 20, 80)
    shuffled = rng.permutation(80)
    assert retrieval_metrics(similarity, owner) == retrieval_metrics(similarity[shuffled], owner[shuffled])
