"""A regulariser of somebody else's: takes the rows' common direction out of them (Mu and Viswanath, ICLR 2018)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from emcl.config import Config
from emcl.distributed import ALONE, Ranks
from emcl.em import AllReduce, Correction, Moments
from emcl.model.pooling import mean_of_frames
from emcl.model.regulariser import Regulariser


@dataclass(frozen=True)
class MeanRemovedConfig:
    """Settings of its own."""

    strength: Annotated[float, Field(ge=0, le=1)] = 1.0
    """How much of it goes."""
    penalty: Annotated[float, Field(ge=0)] = 0.1
    """Of the loss."""
    hubness: Annotated[float, Field(ge=0)] = 0.0
    """How much a video loses that is near to the common direction."""


class MeanRemoved(Regulariser):
    config_class = MeanRemovedConfig

    def __init__(self, settings: MeanRemovedConfig, config: Config, width: int) -> None:
        super().__init__(settings, config, width)
        self.settings = settings
        self.common: Tensor
        self.register_buffer("common", torch.zeros(width))

    @torch.no_grad()
    def correction(
        self, measure: Callable[[], list[Moments]], *, all_reduce: AllReduce | None = None
    ) -> Correction | None:
        if self.training:
            (moments,) = Moments.sum(measure(), all_reduce)
            self.common.lerp_(moments.total / moments.count.clamp_min(1), 0.5)
        direction = self.direction
        weights = torch.ones_like(direction[:1])
        return Correction(
            bases=direction[:, None], weights=weights, offset=None, beta=-self.settings.strength, constant=False
        )

    @property
    def direction(self) -> Tensor:
        """(D,), of length 1, or of 0 before any training."""
        return F.normalize(self.common.float(), dim=0)

    def adjust(self, scores_AB: Tensor, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor) -> Tensor:
        near_B = F.normalize(mean_of_frames(frames_BTD, mask_BT), dim=1) @ self.direction
        return scores_AB - self.settings.hubness * near_B

    def loss(self, text_AD: Tensor, frames_BTD: Tensor, mask_BT: Tensor, ranks: Ranks = ALONE) -> Tensor:
        """The mean squared cosine of texts and the common direction."""
        present_A = mask_BT.any(1)
        squared_A = (F.normalize(text_AD.float(), dim=1) @ self.direction).square()
        return self.settings.penalty * squared_A.sum() / ranks.sum(present_A.sum()).clamp_min(1)
