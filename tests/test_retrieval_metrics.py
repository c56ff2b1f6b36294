"""Recall and ranks equal the published reference's, on its golden numbers and on a real similarity matrix."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from functools import partial

import numpy as np
import pytest

from conftest import ROOT, shared
from emcl.metrics.rescoring import DualSoftmax, QueryBank
from emcl.metrics.retrieval_metrics import (
    BLOCK,
    THREADS,
    Rescore,
    protocol_metrics,
    ranks_of,
    retrieval_metrics,
    rsum,
    text_to_video_ranks,
    video_to_any_text_ranks,
    video_to_text_ranks,
)

DSL = (DualSoftmax(0.01), DualSoftmax(0.01))
NAMES = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "R50": "R@50", "MedianR": "MdR", "MeanR": "MnR"}


def by_bank(bank: np.ndarray, temperature: float = 0.05) -> Rescore:
    return partial(QueryBank(temperature), bank_BG=bank)


def whole(rescore: Rescore, scores: np.ndarray) -> np.ndarray:
    """All rescored scores at once."""
    return rescore(scores)(np.arange(len(scores)))


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
    ours = retrieval_metrics(arrays["similarity"], rescore=DSL)
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
    assert_equal(retrieval_metrics(matrix, rescore=DSL)["text_to_video"], numbers["dsl_t2v"])
    assert retrieval_metrics(matrix)["video_to_text"]["R@1"] == pytest.approx(45.6)  # of 1,000, ties against
    assert retrieval_metrics(matrix, ties="for")["video_to_text"]["R@1"] == pytest.approx(46.0)


def test_the_reference_counts_ties_as_further_queries() -> None:
    matrix = np.load(shared("data/similarity/cap4video_msrvtt_1ka.npy"))
    numbers = json.loads(shared("data/similarity/cap4video_msrvtt_1ka.json").read_text())
    ranks = video_to_text_ranks(matrix, np.arange(1000), ties="reference")
    assert len(ranks) == 1012
    assert_equal(retrieval_metrics(matrix, ties="reference")["video_to_text"], numbers["v2t"])


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


def test_rsum_is_the_sum_of_six_recalls() -> None:
    assert rsum(retrieval_metrics(np.eye(12))) == 600


def test_two_ways_to_count_several_captions() -> None:
    # video 0's best text scores 0.6; both texts of video 1 score higher there
    similarity, owner = np.array([[0.6, 0.1], [0.7, 0.9], [0.8, 0.2]]), [0, 1, 1]
    assert video_to_text_ranks(similarity, owner).tolist() == [2, 1]
    assert video_to_any_text_ranks(similarity, owner).tolist() == [3, 1]


def test_other_ways_to_count_are_shown_where_they_differ() -> None:
    matrix = np.load(shared("data/similarity/cap4video_msrvtt_1ka.npy"))
    metrics, _ = protocol_metrics(matrix, np.arange(1000))
    assert set(metrics) == {"text_to_video", "video_to_text", "video_to_text_as_published", "both"}
    assert metrics["video_to_text"]["R@1"] == pytest.approx(45.6)
    assert metrics["video_to_text_as_published"]["R@1"] == pytest.approx(100 * 460 / 1012, abs=0.05)
    several, _ = protocol_metrics(random_scores(40, 10, 8), np.arange(40) // 4)
    assert set(several) == {"text_to_video", "video_to_text", "video_to_any_text", "both"}


def random_scores(texts: int, videos: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(texts, videos)) * 0.1


def test_the_dual_softmax_equals_its_formula() -> None:
    scores = random_scores(7, 5, 0)
    for over in ("texts", "videos"):
        turned = scores if over == "texts" else scores.T
        ours = whole(DualSoftmax(0.1), turned)
        ours = ours if over == "texts" else ours.T
        for q, g in np.ndindex(scores.shape):
            rivals = scores[:, g] if over == "texts" else scores[q]
            count = len(scores) if over == "texts" else scores.shape[1]
            share = np.exp(scores[q, g] / 0.1) / np.exp(rivals / 0.1).sum()
            assert ours[q, g] == pytest.approx(scores[q, g] * share * count)


def test_the_query_bank_ranks_as_its_formula_does() -> None:
    scores, bank, beta = random_scores(40, 12, 1), random_scores(BLOCK + 30, 12, 2), 20.0
    bank[:, 3] += 0.3  # a hub: the best of most bank queries
    bank[:, 5] -= 1.0  # never the best
    ours = whole(by_bank(bank, 1 / beta), scores)
    hubs = {int(row.argmax()) for row in bank}
    assert 3 in hubs and 5 not in hubs
    changed = 0
    for q, row in enumerate(scores):
        plain = row
        if int(row.argmax()) in hubs:
            plain = np.array([np.exp(beta * row[g]) / np.exp(beta * bank[:, g]).sum() for g in range(len(row))])
            changed += 1
        assert np.argsort(-plain).tolist() == np.argsort(-ours[q]).tolist()
    assert 0 < changed < len(scores)


def test_query_banks_of_both_directions_and_one_query_alone() -> None:
    scores, texts, videos = random_scores(20, 20, 3), random_scores(60, 20, 4), random_scores(20, 50, 5)
    both = retrieval_metrics(scores, rescore=(by_bank(texts), by_bank(videos.T)))
    turned = retrieval_metrics(scores.T, rescore=(by_bank(videos.T), by_bank(texts)))
    assert both["text_to_video"] == turned["video_to_text"] and both["video_to_text"] == turned["text_to_video"]
    alone = whole(by_bank(texts), scores[4:5])  # inductive: no other query of the test is needed
    np.testing.assert_allclose(alone[0], whole(by_bank(texts), scores)[4])


def test_ranks_need_little_memory_beside_the_scores() -> None:
    scores = np.random.default_rng(0).random((4000, 4000), dtype=np.float32)
    tracemalloc.start()
    ranks = ranks_of(scores, np.arange(4000), ties="for")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20
    assert ranks[7] == 1 + (scores[7] > scores[7, 7]).sum()


def test_rescored_ranks_in_blocks_are_those_of_the_whole_matrix() -> None:
    queries = BLOCK * THREADS + 30
    scores = random_scores(queries, queries + 50, 6)
    owner = np.arange(len(scores))
    for rescore in (DualSoftmax(0.05), by_bank(random_scores(40, queries + 50, 7))):
        blocks = text_to_video_ranks(scores, owner, rescore=rescore)
        np.testing.assert_array_equal(blocks, ranks_of(whole(rescore, scores), owner))


def test_rescored_ranks_need_little_memory_beside_the_scores() -> None:
    scores = np.random.default_rng(0).random((3000, 3000), dtype=np.float32)
    tracemalloc.start()
    retrieval_metrics(scores, rescore=DSL)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 * 2**20  # a whole copy in double precision would take 72 MiB


@pytest.mark.slow
def test_ten_thousand_texts_by_as_many_videos_fit_one_gibibyte_beyond_the_features() -> None:
    script = ROOT / "benchmarks" / "large_evaluation.py"
    done = subprocess.run(
        [sys.executable, str(script), "--frames", "2"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(done.stdout.splitlines()[-1])["peak_mib_beyond_features"] < 1024
