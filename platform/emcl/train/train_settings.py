"""Settings of the optimiser and of checkpoints; without PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from emcl.settings import Epochs, Formerly, Steps, group


@group
class OptimConfig:
    """The optimiser with EMCL-Net's groups, and its schedule."""

    lr: float = Field(0.0001, gt=0, description="For the new modules.")
    backbone_lr: Annotated[float, Formerly("clip_lr")] = Field(
        1e-07, ge=0, description="For the backbone's pretrained towers."
    )
    logit_scale_lr: float | None = Field(
        None, ge=0, description="For the logits' scale and bias; `optim.lr` where not given."
    )
    weight_decay: float = Field(0.2, ge=0, description="Of what `optim.decay` says.")
    decay: Literal["matrices", "all_but_biases"] = Field(
        "matrices",
        description="What decays: `matrices` alone, or `all_but_biases`, norms and scales too, as in EMCL-Net's code.",
    )
    optimizer: str = Field(
        "adamw",
        description=(
            "`adamw`, `bert_adam` (of EMCL-Net's code: no bias correction), `sgd`, or what an installed package brings."
        ),
    )
    optimizer_options: dict[str, str] = Field(
        default_factory=dict,
        description=(
            "Settings of its own, where it has some: `max_norm` of `bert_adam`, `momentum` and `nesterov` of `sgd`."
        ),
    )
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=lambda: [0.9, 0.98], min_length=2, max_length=2, description="AdamW's and BertAdam's two."
    )
    eps: float = Field(1e-06, gt=0, description="AdamW's and BertAdam's.")
    grad_clip: float = Field(1.0, ge=0, description="Largest norm of the gradient; 0 does not clip.")
    warmup: float = Field(
        0.1, ge=0, le=1, description="Share of the steps over which the learning rate rises; the schedule follows."
    )
    schedule: str = Field(
        "cosine",
        description=(
            "After the rise: `cosine` or `linear` (both to zero), `constant`, `warmup_cosine` (a cosine of all steps, "
            "as in EMCL-Net's code), or a package's."
        ),
    )
    epochs: Epochs = Field(5, ge=1, le=10**6, description="Rounds over the training samples.")
    max_steps: Steps | None = Field(None, ge=1, description="Stop earlier.")
    max_skipped: Steps = Field(
        10,
        ge=0,
        description=(
            "So many in a row may have a gradient that is not finite (they are left out, on all ranks) before training "
            "stops."
        ),
    )
    accumulation: int = Field(
        1, ge=1, description="Micro-batches a step; negatives come from the micro-batch of all ranks."
    )
    same_video_negatives: bool = Field(
        False,
        description=(
            "Whether two pairs of one video in a batch are negatives of each other in contrastive losses, as in "
            "EMCL-Net's code."
        ),
    )
    gather_with_grad: bool = Field(
        True,
        description=(
            "`false`: of features that are gathered from all ranks, each rank keeps the gradient of its own alone, so "
            "that features' gradients are divided by the number of ranks, and those of logit scales are not, as in "
            "EMCL-Net's code."
        ),
    )


@group
class CheckpointConfig:
    """What resuming needs."""

    every_steps: Steps = Field(1000, ge=1, description="Between two checkpoints.")
    keep: int = Field(2, ge=1, description="The newest so many are kept.")
