"""Settings of evaluations; without PyTorch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from emcl.settings import Clips, Epochs, Steps, group


@group
class EvaluateConfig:
    """How validation and test splits are scored."""

    every_epochs: Epochs = Field(
        1,
        ge=1,
        description="Validate after so many epochs; the test set is scored once, at the end, with the best model.",
    )
    every_steps: Steps | None = Field(
        None, ge=1, description="Validate after so many steps, and at the end, in place of `every_epochs`."
    )
    select: Literal["val", "test"] = Field(
        "val",
        description=(
            "Whose scores choose the best model: `data.val`, or `data.test` as in EMCL-Net's code, which flatters it; "
            "scores then say so."
        ),
    )
    batch_size: Clips = Field(32, ge=1, description="Samples a rank encodes at once.")
    tile: int = Field(
        32,
        ge=1,
        description="Texts x videos that meet the reference EMCL together; its scores depend on this (docs/emcl.md).",
    )
    dsl: bool = Field(
        False, description="Also report the dual softmax (transductive: it uses all test queries together)."
    )
    dsl_temperature: float = Field(0.01, gt=0, description="Of the dual softmax that `dsl` asks for.")
    rescoring: str = Field(
        "none",
        description=(
            "Also report retrieval with its similarity changed before ranking: `dsl`, or what an installed package "
            "brings. `emcl options` tries all, and alone those that need a bank of training samples, as `qb_norm` does."
        ),
    )
    rescoring_options: dict[str, str] = Field(
        default_factory=dict, description="Settings of the rescoring's own, where it has some."
    )
    shuffle_frames: bool = Field(
        False, description="Score with every video's frames in a random order, to see whether order matters."
    )
    swap_videos: bool = Field(
        False,
        description=(
            "Score with the videos dealt out anew among the samples: a control, which says what is known without them."
        ),
    )

    def __post_init__(self) -> None:
        if self.dsl and self.rescoring == "dsl":
            raise ValueError("rescoring=dsl is what dsl=true asks for already: give one of them")
