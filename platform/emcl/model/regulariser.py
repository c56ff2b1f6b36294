"""Regularisers between embeddings and their scores: EMCL, or another package's.

A regulariser may do any of these; each has a default that does nothing:

- fit itself to the rows that are compared, or to collected pairs, and keep the result as its state (buffers);
- correct every row, by the same map for all (`correction`);
- change the scores of texts and videos (`adjust`);
- add a loss of its own (`loss`).

Kinds are listed in `emcl.components`. Each task that compares has its own instance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from emcl.components import REGULARISERS
from emcl.config import Config
from emcl.distributed import ALONE, Ranks
from emcl.em import AllReduce, Correction, Moments


class Regulariser(nn.Module):
    """Base class of regularisers.

    Legend: A texts of this rank, B videos of all ranks, T frames, D width, N rows of any kind.

    Its state is buffers, which move with the model, are saved with it, and are the same on every rank. Parameters work
    too, but not under ZeRO-3, which gathers them only during forward passes.

    Args:
        settings: an instance of `config_class`, from `model.regulariser_options`; None without one.
        config: the run's configuration.
        width: D.
    """

    config_class: ClassVar[type | None] = None
    """A frozen dataclass of its own settings."""
    fits_directions: bool = False
    """What it is fitted to: the moments of all rows together, as they are; or, if true, those of the rows' directions
    (each divided by its norm), separately for videos and texts."""
    transductive: bool = False
    """Whether scores depend on what else is compared: evaluations then apply it tile by tile, and reports say so."""
    batched: bool = False
    """Whether `correction` and `adjust` also work for many tiles at once under `torch.func.vmap`: they must then not
    read tensor values, nor change the state. This makes comparing several times as fast on GPUs."""

    def __init__(self, settings: Any = None, config: Config | None = None, width: int = 0) -> None:
        super().__init__()

    @property
    def label(self) -> str:
        """Its name in tables."""
        return type(self).__name__

    @classmethod
    def create(cls, config: Config, width: int) -> Regulariser:
        """From the configuration of a run.

        Raises:
            UserError: settings that it refuses.
        """
        return cls(REGULARISERS.options(config.model.regulariser, config.model.regulariser_options), config, width)

    def correction(
        self, measure: Callable[[], list[Moments]], *, all_reduce: AllReduce | None = None
    ) -> Correction | None:
        """The map that corrects every row; None for none. In training mode the state is updated here.

        Called by all ranks, once a step in training; in evaluations once a tile, or only once.

        Args:
            measure: returns the moments of this rank's rows: of all together, or, with `fits_directions`, of each
                modality's directions; to be called only if needed, as it processes all rows.
            all_reduce: sums over ranks (`Moments.sum` takes it); None on one.
        """
        return None

    def fit(self, video: Tensor, text: Tensor | None = None) -> Self:
        """Fits itself to collected features, (n, D) of each modality, in place of training batches.

        Raises:
            ValueError: it has no state that can be fitted this way.
        """
        raise ValueError(f"{self.label} is fitted in training alone")

    def forward(self, *blocks: Tensor, all_reduce: AllReduce | None = None) -> tuple[Tensor, ...]:
        """Rows (..., D) of one or several modalities, corrected by the map that is fitted to all of them."""
        correction = self.correction(lambda: self.measure(*blocks), all_reduce=all_reduce)
        return blocks if correction is None else tuple(correction(block) for block in blocks)

    def measure(self, *blocks: Tensor) -> list[Moments]:
        """The moments of rows (..., D) that it is fitted to; rows of zeros are absent ones and do not count."""
        if self.fits_directions:
            return [Moments.of_directions(block) for block in blocks]
        moments = [replace(Moments.of(block), count=block.any(-1).sum().float()) for block in blocks]
        return [sum(moments[1:], moments[0])]

    def adjust(self, scores_AB: Tensor, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        """Retrieval's scores (A, B), for training and for ranking, from the cosines of the corrected rows; in fp32.

        The contrastive term of question answering, which nothing is ranked by, uses its cosines as they are.

        Args:
            text_AD, frames_BTD, mask_BT: the towers' embeddings, and which frames are present.
        """
        return scores_AB

    def loss(self, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, ranks: Ranks = ALONE) -> Tensor | None:
        """This rank's share of an additional loss; the shares of all ranks add up to that of the global batch.

        Called after `correction`, in the run's precision.

        Args:
            text_AD: this rank's texts; zeros where a sample has none.
            frames_BTD, mask_BT: this rank's videos (B = A), each beside its text; no frame where it has no text.
        """
        return None

    def protocol(self, tile: int) -> str:
        """A report's description of scores with it, for tiles of so many texts x videos."""
        within = f" in tiles of {tile} x {tile}" if self.transductive else ""
        return f"{self.label}{within}"


def regulariser_of(config: Config, width: int) -> Regulariser | None:
    """The configured one, for rows of `width`; None if it is off.

    Raises:
        UserError: settings that it refuses, such as more bases than the rows are wide.
    """
    if not config.emcl.enabled:
        return None
    kind: type[Regulariser] = REGULARISERS.load_class(config.model.regulariser, Regulariser)
    return kind.create(config, width)


def adjusted(
    regulariser: Regulariser | None, scores_AB: Tensor, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor
) -> Tensor:
    """The scores, adjusted by the regulariser if there is one."""
    if regulariser is None:
        return scores_AB
    with torch.autocast(scores_AB.device.type, enabled=False):
        return regulariser.adjust(scores_AB, text_AD, frames_BTD, mask_BT)
