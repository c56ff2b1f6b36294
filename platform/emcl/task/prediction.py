"""What a task says of videos to people who only use the model: `emcl caption`, `emcl ask`, the page and the API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

import numpy as np
from torch import Tensor

from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.regulariser import Regulariser
from emcl.nearest import nearest

COMPARE = "compare sentences with videos"
"""What a task can do that `Compares`."""


@dataclass(frozen=True)
class Prediction:
    """Something said of one video."""

    text: str
    probability: float | None = None
    """From 0 to 1; None where the task gives none."""


@dataclass(frozen=True)
class Offer:
    """How people get at a task's predictions: by `emcl predict`, by a button of the page, by an endpoint."""

    verb: str
    """What the task does, such as `caption` or `answer`. Tasks of one verb stand in for each other: `emcl caption` and
    `VideoTextModel.caption` take whichever the model has."""
    button: str
    """On the page, such as `Describe it`."""
    description: str
    """One sentence, for the help of people and programs."""
    question: str | None = None
    """An example of the question that comes with the video; None for a task that is asked nothing."""


def only_task(run: object, able: Sequence[str], task: str | None, deed: str, way: str) -> str:
    """Which of a run's tasks is meant, of those that are able to do something.

    Args:
        task: as it is named by the user, if it is.
        deed: what they are able to do, such as `caption`.
        way: how one is named, such as `--task`.

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

    Any task is one that has these two; there is nothing to inherit.
    """

    emcl: Regulariser | None
    """The regulariser that was trained for it, EMCL or another; checkpoints know it by this name."""

    def similarity_in_tiles(
        self, text_QD: Tensor, frames_GTD: Tensor, mask_GT: Tensor, tile: int, ranks: Ranks, layer: Regulariser | None
    ) -> np.ndarray[Any, Any]:
        """(Q, G) on rank 0 and (0, G) elsewhere; higher is more alike. Called by all ranks.

        Args:
            text_QD: sentences.
            frames_GTD, mask_GT: videos, and which of their frames there are.
            tile: texts x videos that meet a transductive regulariser together, such as the reference EMCL.
            ranks: those that share the work.
            layer: what both go through, the task's own or another; None for none.
        """
        ...


def compares(task: Any) -> TypeGuard[Compares]:
    """Not by `isinstance`, which from Python 3.12 on sees no submodule of an nn.Module."""
    return hasattr(task, "emcl") and callable(getattr(task, "similarity_in_tiles", None))
