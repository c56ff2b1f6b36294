"""What may be done to a similarity before it is ranked: the dual softmax, and normalisation by a query bank.

Both see queries (rows) and candidates (columns), so video-to-text hands them the transposed similarity. They give their
scores block by block: of a whole matrix they keep a few numbers a candidate.

Legend: Q test queries, G candidates, B queries of a bank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emcl.metrics.retrieval import Blocks, in_blocks, rows


@dataclass(frozen=True)
class DualSoftmax:
    """Similarity times its softmax over the queries and their number (EMCL-Net++'s DSL).

    Transductive: every score depends on all queries of the test set.
    """

    temperature: float = 0.01

    def __call__(self, scores_QG: NDArray[np.floating]) -> Blocks:
        highest, total = _softmax_sums(scores_QG, self.temperature)
        share = len(scores_QG) / total

        def block(queries: NDArray[np.int64]) -> NDArray[np.float64]:
            part = rows(scores_QG, queries).astype(np.float64)
            return part * np.exp((part - highest) / self.temperature) * share

        return block


@dataclass(frozen=True)
class QueryBank:
    """QB-Norm's dynamic inverted softmax (Bogolin et al., CVPR 2022), each query by itself: inductive.

    A candidate that is the best of some bank query attracts too many. A test query whose best candidate is such a one
    has its scores divided by what the bank gives each candidate; others stay as they are.
    """

    bank_BG: ArrayLike
    """Queries of the training set x the test's candidates."""
    temperature: float = 0.05
    """Of the softmax, 1 / beta."""

    def __call__(self, scores_QG: NDArray[np.floating]) -> Blocks:
        bank = np.asarray(self.bank_BG)
        active = np.zeros(bank.shape[1], bool)
        for best in in_blocks(lambda here: bank[here].argmax(1), len(bank)):
            active[best] = True
        highest, total = _softmax_sums(bank, self.temperature)
        level = highest + self.temperature * np.log(total)  # of each candidate, in the units of a similarity

        def block(queries: NDArray[np.int64]) -> NDArray[np.float64]:
            part = rows(scores_QG, queries).astype(np.float64)
            hub = active[part.argmax(1)]
            # a monotone map of a query's scores moves no rank, so the logarithm of the published ratio does
            return np.where(hub[:, None], part - level, part)

        return block


def _softmax_sums(
    scores_QG: NDArray[np.floating], temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of each candidate: its highest score h, and the sum over queries of exp((score - h) / temperature)."""
    highest = scores_QG.max(0).astype(np.float64)
    total = np.zeros(scores_QG.shape[1])
    for share in in_blocks(lambda here: np.exp((scores_QG[here] - highest) / temperature).sum(0), len(scores_QG)):
        total += share
    return highest, total
