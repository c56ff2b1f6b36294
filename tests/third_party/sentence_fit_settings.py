"""The settings of the task; without PyTorch, so that a wrong one is refused at once."""

from __future__ import annotations

from pydantic import Field

from emcl.settings import group


@group
class SentenceFitConfig:
    """Whether a sentence fits a video."""

    weight: float = Field(1.0, ge=0, description="Of this task's loss.")
