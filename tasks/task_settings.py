"""Settings of the tasks; without PyTorch, so that a wrong one is refused at once."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from emcl.model.model_settings import Generation
from emcl.settings import Formerly, Tokens, group

HEAD = 64
"""Width of a decoder's head, at least."""


@group
class RetrievalConfig:
    """Text-to-video and video-to-text retrieval."""

    weight: float = Field(1.0, ge=0, description="Of this task's loss.")
    pooling_temperature: float = Field(3.0, gt=0, description="Of the text-conditioned pooling's softmax over frames.")
    logit_scale: float | None = Field(
        None, gt=0, description="Initial scale of the logits; the tower's own where not given."
    )
    loss: Literal["contrastive", "sigmoid"] = Field(
        "contrastive",
        description="`contrastive`, CLIP's symmetric softmax over the batch, or `sigmoid`, SigLIP's for each pair.",
    )
    logit_bias: float | None = Field(
        None, description="Initial bias of the sigmoid loss's logits; the tower's own where not given, or -10."
    )

    def __post_init__(self) -> None:
        if self.logit_bias is not None and self.loss != "sigmoid":
            raise ValueError("logit_bias is one of loss=sigmoid")


def _in_heads(width: int) -> int:
    heads = max(1, width // HEAD)
    if width % heads:
        raise ValueError(f"width={width} does not fall into {heads} heads: take {heads * HEAD}")
    return width


@group
class CaptioningConfig:
    """Captions from a decoder over the frames."""

    weight: float = Field(1.0, ge=0, description="Of this task's loss.")
    layers: int = Field(3, ge=1, description="Of the decoder.")
    width: Annotated[int, AfterValidator(_in_heads)] | None = Field(
        None, ge=1, description="Of the decoder, in heads of 64 or somewhat more; the backbone's where not given."
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="In the decoder.")
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="Share of a token's probability that all tokens have in common."
    )
    max_tokens: Annotated[Tokens, Formerly("words")] = Field(48, ge=2, description="Of the longest caption.")
    captions_per_video: int = Field(
        1, ge=1, description="References of a video that a step trains on; all are drawn in the course of the epochs."
    )
    emcl: bool = Field(
        True,
        description=(
            "Compact the frames by EMCL before the decoder; always the compact variant, as a caption must not "
            "depend on the other videos of its batch. `emcl.bases`, `emcl.balance` and `emcl.momentum` are the run's."
        ),
    )
    emcl_beta: float = Field(0.5, ge=0, description="`emcl.beta` of this task's layer.")
    tokenizer: str | None = Field(None, description="Folder of a Hugging Face tokenizer; CLIP's BPE where not given.")
    pretrained: str | None = Field(None, description="Folder of a GPT-2 with its tokenizer, to start from.")
    vocabulary: str | None = Field(
        None, description="The tokens that the training captions use; found by the run itself."
    )
    generation: Generation = Field(default_factory=Generation)

    def __post_init__(self) -> None:
        longest = self.generation.max_new_tokens
        if longest > self.max_tokens:
            raise ValueError(
                f"generation.max_new_tokens={longest} is not a whole number of tokens from 1 to {self.max_tokens}, the "
                "longest caption of training (max_tokens)"
            )


@group
class QAConfig:
    """MSRVTT-QA as a choice among the commonest answers."""

    weight: float = Field(1.0, ge=0, description="Of this task's losses.")
    contrastive_weight: float = Field(
        0.5,
        ge=0,
        description="Of the symmetric contrastive loss of questions and their videos, over EMCL of the projected rows.",
    )
    answers_kept: int = Field(
        1500, ge=1, description="What it chooses from: so many of the training split's most frequent answers."
    )
    answers_counted: int | None = Field(
        None,
        ge=1,
        description=(
            "The vocabulary of `accuracy_in_vocabulary`, where it is larger: so many of the most frequent answers. "
            "Published: 1500, of which 1000 can be chosen."
        ),
    )
    answers: list[str] | None = Field(
        None, min_length=1, description="What it chooses from, most frequent first; found by the run itself."
    )
    answers_beyond: list[str] | None = Field(
        None, description="Those of `answers_counted` that are no choice; found by the run itself."
    )
    questions_per_video: int = Field(
        1,
        ge=1,
        description="Questions of a video that a step trains on, drawn anew each time; with `data.pairs=question` one.",
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="In the head.")
    head: Literal["masked", "reference"] = Field(
        "masked",
        description=(
            "`reference`, that of EMCL-Net's code: padding takes part in the pooling's softmax and is masked "
            "afterwards, tokens pass the text tower's last projection, weights begin from N(0, 0.02)."
        ),
    )
    fusion: Literal["concat", "product"] = Field(
        "concat", description="Of video and question: `concat`, as published, or `product`, which adds their product."
    )
    use_video: bool = Field(
        True, description="`false` trains and scores on the questions alone: what the video must beat."
    )

    def __post_init__(self) -> None:
        if self.answers_counted is not None and self.answers_counted < self.answers_kept:
            raise ValueError(f"answers_counted={self.answers_counted} is less than answers_kept={self.answers_kept}")
