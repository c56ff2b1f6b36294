"""Rescoring of a similarity before ranking: the dual softmax, and normalisation by a query bank.

Both take queries as rows and candidates as columns, so video-to-text passes the transposed similarity. Scores are
computed block by block; only a few numbers per candidate are kept in memory.

Legend: Q test queries, G candidates, B queries of a bank.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from emcl.metrics.retrieval_metrics import Blocks, in_blocks, rows


@dataclass(frozen=True)
class DualSoftmax:
    """Similarity times its softmax over the queries, times their number (EMCL-Net++'s DSL).

    Transductive: every score depends on all queries of the test set.
    """

    temperature: float = 0.01

    def __call__(self, scores_QG: NDArray[np.floating]) -> Blocks:
        highest, total = _softmax_sums(scores_QG, self.temperature)
        share = len(scores_QG) / total

        def block(queries: NDArray[np.int64]) -> NDArray[np.float64]:
            scores = rows(scores_QG, queries).astype(np.float64)
            return scores * np.exp((scores - highest) / self.temperature) * share

        return block


@dataclass(frozen=True)
class QueryBank:
    """QB-Norm's dynamic inverted softmax (Bogolin et al., CVPR 2022). Inductive: test queries are independent.

    A candidate that is the best match of some bank query is a hub. If the best candidate of a test query is a hub, the
    query's scores are divided by the bank's softmax sums of each candidate; other queries are unchanged.
    """

    bank_BG: ArrayLike
    """Similarity of training queries (rows) and test candidates (columns)."""
    temperature: float = 0.05
    """Temperature of the softmax, 1 / beta."""

    def __call__(self, scores_QG: NDArray[np.floating]) -> Blocks:
        bank = np.asarray(self.bank_BG)
        active = np.zeros(bank.shape[1], bool)
        for best in in_blocks(lambda here: bank[here].argmax(1), len(bank)):
            active[best] = True
        highest, total = _softmax_sums(bank, self.temperature)
        level = highest + self.temperature * np.log(total)  # per candidate, in the units of a similarity

        def block(queries: NDArray[np.int64]) -> NDArray[np.float64]:
            scores = rows(scores_QG, queries).astype(np.float64)
            hub = active[scores.argmax(1)]
            # the logarithm of the published ratio gives the same ranks: a monotone map of a query's scores changes none
            return np.where(hub[:, None], scores - level, scores)

        return block


def _softmax_sums(
    scores_QG: NDArray[np.floating], temperature: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each candidate: its highest score h, and the sum over queries of exp((score - h) / temperature)."""
    highest = scores_QG.max(0).astype(np.float64)
    total = np.zeros(scores_QG.shape[1])
    for share in in_blocks(lambda here: np.exp((scores_QG[here] - highest) / temperature).sum(0), len(scores_QG)):
        total += share
    return highest, total
