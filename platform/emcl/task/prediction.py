"""Predictions of tasks for users of a model: `emcl caption`, `emcl ask`, the page and the API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
from torch import Tensor

from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.regulariser import Regulariser
from emcl.suggestions import nearest
from emcl.task.scorer import Scorer

COMPARE = "compare sentences with videos"
"""What a task that `Compares` can do."""


@dataclass(frozen=True)
class Prediction:
    """A prediction for one video."""

    text: str
    probability: float | None = None
    """From 0 to 1; None where the task gives none."""


@dataclass(frozen=True)
class Offer:
    """How users reach a task's predictions: by `emcl predict`, by a button of the page, by an endpoint."""

    verb: str
    """What the task does, such as `caption` or `answer`. Tasks with the same verb are interchangeable: `emcl caption`
    and `VideoTextModel.caption` take whichever the model has."""
    button: str
    """On the page, such as `Describe it`."""
    description: str
    """One sentence, for the help of people and programs."""
    question: str | None = None
    """An example of the question that comes with the video; None for a task without a question."""


def only_task(run: object, able: Sequence[str], task: str | None, deed: str, way: str) -> str:
    """The selected task among those of a run that are able to do something.

    Args:
        task: the name given by the user, if any.
        deed: what they are able to do, such as `caption`.
        way: how to name one, such as `--task`.

    Raises:
        UserError: none is able, another one is named, or several are able and none is named.
    """
    if not able:
        raise UserError(f"{run}: no task that it was trained for can {deed}")
    if task is not None and task not in able:
        raise UserError(
            f"{run}: {task!r} is no task of it that can {deed}{nearest(task, able)} ({', '.join(able)} can)"
        )
    if task is None and len(able) > 1:
        raise UserError(f"{run}: several of its tasks can {deed}: name one of {', '.join(able)} ({way})")
    return task or able[0]


class Compares(Protocol):
    """A task by which sentences and videos are compared: `emcl index`, `emcl search`, `VideoTextModel.similarity`.

    Any task with these two attributes is one; there is nothing to inherit. With a third, `log_odds_scale`, a number
    that turns its scores into log-odds, the shared factors of its model add to them, if its scorer counts them too
    (`takes_factors`).
    """

    emcl: Regulariser | None
    """The regulariser that was trained for it, EMCL or another; `emcl` is also its name in checkpoints."""

    def similarity_in_tiles(
        self, text_QD: Tensor, frames_GTD: Tensor, mask_GT: Tensor, tile: int, ranks: Ranks, layer: Regulariser | None
    ) -> np.ndarray[Any, Any]:
        """(Q, G) on rank 0 and (0, G) elsewhere; higher is more alike. Called by all ranks.

        Args:
            text_QD: sentences.
            frames_GTD, mask_GT: videos, and which of their frames are present.
            tile: texts x videos that meet a transductive regulariser together, such as the reference EMCL.
            ranks: those that share the work.
            layer: regulariser applied to both, the task's own or another; None for none.
        """
        ...


def log_odds_scale_of(task: Any) -> float | None:
    """Of a task that compares, if it has one: no shared factors add to the scores of others."""
    scale = getattr(task, "log_odds_scale", None) if compares(task) else None
    return None if scale is None else float(scale)


def takes_factors(kind: Any) -> bool:
    """Whether the evaluations of a class of tasks count shared factors, which no prediction may do alone."""
    return kind.scorer_class.factor_weight is not Scorer.factor_weight


def compares(task: Any) -> TypeGuard[Compares]:
    """Does not use `isinstance`, which from Python 3.12 on does not see submodules of an nn.Module."""
    return hasattr(task, "emcl") and callable(getattr(task, "similarity_in_tiles", None))
