"""EMCL as a regulariser: the layer of `emcl.em`, which is independent of this project, made from a run's settings."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from emcl.config import Config
from emcl.em import EMCL, Moments
from emcl.errors import UserError
from emcl.model.regulariser import Regulariser

INFERENCE_MODULE: dict[str, Any] = {"bases": 64, "beta": 0.5, "balance": 0.0}
"""Settings of the compact variant for features of a model that was trained without it."""


class EMCLLayer(EMCL, Regulariser):
    """Made as `emcl.EMCL` is, or by `create` from `emcl.*` of a configuration."""

    batched = True

    @classmethod
    def create(cls, config: Config, width: int, **changes: Any) -> EMCLLayer:
        """From `emcl.*`, with `changes` to the layer's arguments."""
        chosen = config.emcl
        settings: dict[str, Any] = {
            "bases": chosen.bases,
            "iterations": chosen.iterations,
            "temperature": chosen.temperature,
            "beta": chosen.beta,
            "momentum": chosen.momentum,
            "balance": chosen.balance,
            "variant": chosen.variant,
            "width": width,
            "seed": config.seed,
        }
        try:
            return cls(**{**settings, **changes})
        except ValueError as error:
            raise UserError(f"emcl.*: {error}") from None

    @property
    def fits_directions(self) -> bool:  # type: ignore[override]
        return self.variant == "compact"

    @property
    def transductive(self) -> bool:  # type: ignore[override]
        """The reference is fitted anew to the rows that are compared."""
        return self.variant == "reference"

    def measure(self, *blocks: Tensor) -> list[Moments]:
        """As a regulariser: rows of zeros are absent ones."""
        return Regulariser.measure(self, *blocks)

    @property
    def label(self) -> str:
        return self.variant

    def protocol(self, tile: int) -> str:
        if self.transductive:
            return f"EMCL reference in tiles of {tile} x {tile}"
        return "EMCL compact, bases of training"
