"""Chooses the shrinkage of shared factors by folds of the training videos, from moments alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

from torch import Tensor

from .correlation import Axes, Factors
from .pairs import Covariances, PairMoments

Shrinkage = tuple[float, float]
STEPS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_START = (3, 2)  # 1 and 0.3
_STRAIGHT, _DIAGONAL = ((1, 0), (-1, 0), (0, 1), (0, -1)), tuple(product((1, -1), repeat=2))
_FITTED, _JUDGED = 2, 1
"""Pairs without which nothing can be fitted, or judged."""


class Choice(NamedTuple):
    """What the folds say."""

    shrinkage: Shrinkage
    held_out: float
    """`held_out_score` of a pair, in the mean over the folds; below 0 where the pairs show nothing that lasts."""


def choose_shrinkage(
    parts: Sequence[PairMoments],
    whole: PairMoments,
    axes_of: Callable[[Covariances], Axes],
    fit: Callable[[Axes, Shrinkage], Factors],
) -> Choice | None:
    """s_v and s_t by climbing from (1, 0.3) until no step to any side gives a higher `held_out_score`.

    None if the pairs are too few, or all in one fold.

    Args:
        parts: the moments of each fold.
        whole: their sum.
        axes_of: the axes of a training part.
        fit: EM in those.
    """
    judged = []
    for part in parts:
        rest = whole - part
        if rest.counts["pairs"] >= _FITTED and part.counts["pairs"] >= _JUDGED:
            centres = rest.means
            axes = axes_of(rest.covariances(centres))
            judged.append((axes, axes.turned(part.covariances(centres)), part.cross[-1, -1]))
    if not judged:
        return None
    seen: dict[tuple[int, int], float] = {}

    def score(at: tuple[int, int]) -> float:
        if at not in seen:
            shrinkage = STEPS[at[0]], STEPS[at[1]]
            seen[at] = float(sum(pairs * held_out_score(fit(axes, shrinkage), held) for axes, held, pairs in judged))
        return seen[at]

    best, before = _START, None
    while best != before:
        before = best
        for steps in (_STRAIGHT, _DIAGONAL):
            around = [(best[0] + step[0], best[1] + step[1]) for step in steps]
            best = max([best, *(at for at in around if min(at) >= 0 and max(at) < len(STEPS))], key=score)
            if best != before:
                break
    pairs = float(sum(number for *_, number in judged))
    return Choice((STEPS[best[0]], STEPS[best[1]]), score(best) / pairs)


def held_out_score(factors: Factors, held: Covariances) -> Tensor:
    """How far above random ones held-out pairs score: mean LLR(pair) - log mean exp LLR(video, any text).

    A lower bound of what the modalities tell of each other (Donsker and Varadhan), as contrastive losses maximise one.
    For normal codes it has a closed form: with the variances alpha and beta and the covariance of the held-out codes a
    and b, each factor adds

        w cov - q (alpha + beta) + log[(1 + 2 q alpha) (1 + 2 q beta) - w^2 alpha beta] / 2

    Args:
        held: in the same axes as the factors' bases.
    """
    alpha_K = ((held.text @ factors.text) * factors.text).sum(0)
    beta_K = ((held.video @ factors.video) * factors.video).sum(0)
    covariance_K = ((held.cross @ factors.video) * factors.text).sum(0)
    r_K = factors.correlation
    w_K = r_K / (1 - r_K.square())
    q_K = w_K * r_K / 2
    random_K = (1 + 2 * q_K * alpha_K) * (1 + 2 * q_K * beta_K) - w_K.square() * alpha_K * beta_K
    # at 0 and below the mean of random pairs has no bound: these factors are far too sure of themselves
    return (w_K * covariance_K - q_K * (alpha_K + beta_K) + random_K.clamp_min(1e-12).log() / 2).sum()
