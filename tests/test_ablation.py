"""The ablation's statistics: differences that are there are found, and those that are not are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ablation_models import Measured, effective_rank
from ablation_statistics import hits, paired_bootstrap


def measured(right: np.ndarray, captions: int = 2) -> Measured:
    """A result in which the queries of `right` videos find theirs, in both directions."""
    ranks = np.where(right, 1, 7)
    return Measured(np.repeat(ranks, captions), ranks, np.repeat(np.arange(len(right)), captions), 0.0, 0.0)


def draws(share: float, seeds: int = 5, videos: int = 400) -> list[np.ndarray]:
    return [np.random.default_rng((seed, 1)).random(videos) < share for seed in range(seeds)]


def test_recall_is_the_mean_of_both_directions() -> None:
    one = measured(np.array([True, False, False, True]))
    assert one.recall == 50
    assert hits(one).tolist() == [100, 0, 0, 100]


def test_a_gain_of_the_same_queries_everywhere_is_found() -> None:
    before = draws(0.1)
    gain = np.zeros(400, bool)
    gain[:20] = True
    comparison = paired_bootstrap([measured(right | gain) for right in before], [measured(right) for right in before])
    assert comparison.mean == pytest.approx(100 * np.mean([(right | gain).mean() - right.mean() for right in before]))
    assert comparison.p < 0.001 and 0 < comparison.low < comparison.mean < comparison.high


def test_no_difference_has_none() -> None:
    same = [measured(right) for right in draws(0.1)]
    assert paired_bootstrap(same, same).p == 1
    one, other = draws(0.1), [right[::-1] for right in draws(0.1)]
    assert paired_bootstrap([measured(r) for r in one], [measured(r) for r in other]).p > 0.05


def test_a_gain_in_one_seed_alone_is_not_taken_for_one_of_the_method() -> None:
    before = draws(0.1)
    lucky = [before[0] | (np.arange(400) < 12), *before[1:]]
    assert paired_bootstrap([measured(r) for r in lucky], [measured(r) for r in before]).p > 0.05


def test_effective_rank() -> None:
    rows = torch.linalg.qr(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(rows - rows.mean(0)) == pytest.approx(8, abs=0.2)
    assert effective_rank(torch.randn(200, 1) @ torch.randn(1, 8)) == pytest.approx(1, abs=1e-2)
