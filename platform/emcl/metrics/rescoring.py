"""Rescoring of a similarity before ranking: the dual softmax, and normalisation by a query bank.

Each takes queries as rows and candidates as columns, so video-to-text passes the transposed similarity. Scores are
computed block by block; only a few numbers per candidate are kept in memory.

Legend: Q test queries, G candidates, B queries of a bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from emcl.components import RESCORINGS
from emcl.errors import UserError
from emcl.metrics.retrieval_metrics import Blocks, in_blocks, rows, unchanged


@dataclass(frozen=True)
class Rescoring:
    """Base class of what changes a similarity before it is ranked; by itself it changes nothing.

    Chosen by name (`evaluate.rescoring`); `emcl options` tries all. The fields are its settings, and what it makes of
    them it makes in `__post_init__`.
    """

    label: ClassVar[str] = ""
    """What tables call it; its name where it has none of its own."""
    transductive: ClassVar[bool] = False
    """Whether a query's scores depend on the other queries of the test set."""
    uses_bank: ClassVar[bool] = False
    """Whether it needs `bank_BG`, which `emcl options` alone computes."""

    def __call__(self, scores_QG: NDArray[Any], bank_BG: NDArray[Any] | None = None) -> Blocks:
        """The new scores of any queries, on demand.

        Args:
            scores_QG: similarity of the test's queries and candidates.
            bank_BG: similarity of training queries and the test's candidates.
        """
        return unchanged(scores_QG)


def rescoring_of(name: str, options: Mapping[str, str] | None = None) -> Rescoring:
    """The rescoring of this name, with its own settings.

    Raises:
        UserError: there is none, or it has no such setting.
    """
    RESCORINGS.load_class(name, Rescoring)
    rescoring: Rescoring = RESCORINGS.options(name, options or {})
    return rescoring


def check_rescoring(name: str, options: Mapping[str, str]) -> None:
    """Whether an evaluation can use the rescoring of this name, with these settings.

    Raises:
        UserError: there is none, it has no such setting, or it needs a bank.
    """
    if rescoring_of(name, options).uses_bank:
        raise UserError(
            f"{RESCORINGS.setting}={name} needs a bank of training samples, which an evaluation does not encode: "
            "`emcl options RUN` scores it"
        )


def label_of(name: str) -> str:
    """What tables call the rescoring of this name; the name itself where its package is not installed."""
    try:
        return vars(RESCORINGS.load_class(name, Rescoring)).get("label") or name
    except UserError:
        return name


def described(name: str, rescoring: Rescoring) -> str:
    """Its label with the settings that are not the usual ones: `DSL (temperature=0.05)`."""
    try:
        usual = asdict(rescoring_of(name))
    except UserError:  # one of its settings has to be given
        usual = {}
    chosen = [f"{key}={value}" for key, value in asdict(rescoring).items() if key not in usual or value != usual[key]]
    return f"{label_of(name)} ({', '.join(chosen)})" if chosen else label_of(name)


@dataclass(frozen=True)
class DualSoftmax(Rescoring):
    """Similarity times its softmax over the queries, times their number (EMCL-Net++'s DSL).

    Transductive: every score depends on all queries of the test set.
    """

    label = "DSL"
    transductive = True
    temperature: Annotated[float, Field(gt=0, description="Of the softmax over the queries.")] = 0.01

    def __call__(self, scores_QG: NDArray[Any], bank_BG: NDArray[Any] | None = None) -> Blocks:
        highest, total = _softmax_sums(scores_QG, self.temperature)
        share = len(scores_QG) / total

        def block(queries: NDArray[np.int64]) -> NDArray[np.float64]:
            scores = rows(scores_QG, queries).astype(np.float64)
            return scores * np.exp((scores - highest) / self.temperature) * share

        return block


@dataclass(frozen=True)
class QueryBank(Rescoring):
    """QB-Norm's dynamic inverted softmax (Bogolin et al., CVPR 2022). Inductive: test queries are independent.

    A candidate that is the best match of some bank query is a hub. If the best candidate of a test query is a hub, the
    query's scores are divided by the bank's softmax sums of each candidate; other queries are unchanged.
    """

    label = "QB-Norm"
    uses_bank = True
    temperature: Annotated[float, Field(gt=0, description="Of the softmax over the bank, 1 / beta.")] = 0.05

    def __call__(self, scores_QG: NDArray[Any], bank_BG: ArrayLike | None = None) -> Blocks:
        if bank_BG is None:
            raise TypeError("QB-Norm needs a bank")
        bank = np.asarray(bank_BG)
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
