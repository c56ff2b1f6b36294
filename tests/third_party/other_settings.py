"""The settings of the tasks; without PyTorch, so that a wrong one is refused at once."""

from __future__ import annotations

from pydantic import Field

from emcl.settings import group


@group
class TemporalOrderConfig:
    """Whether frames run forwards or backwards."""

    weight: float = Field(1.0, ge=0, description="Of this task's loss.")
    hidden: int = Field(64, ge=1, description="Width of the recurrent layer.")


@group
class SentenceFitConfig:
    """Whether a sentence fits a video."""

    weight: float = Field(1.0, ge=0, description="Of this task's loss.")
