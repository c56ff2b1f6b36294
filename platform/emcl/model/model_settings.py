"""Settings of the backbone, of the EMCL layer and of decoding; without PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from emcl.settings import Clips, Formerly, Tokens, group

MAX_FRAMES = 77
"""Frame positions of the temporal transformer, as many as CLIP's text tower has."""


@group
class ModelConfig:
    """The shared backbone, and what comes between its embeddings and their scores."""

    backbone: str = Field(
        "open_clip",
        description="Kind of towers: `open_clip`, or what an installed package brings; `name` is one of its models.",
    )
    backbone_options: dict[str, str] = Field(
        default_factory=dict, description="Settings of the kind's own, where it has some."
    )
    name: str = Field(
        "ViT-B-32",
        min_length=1,
        description="An open_clip configuration, or the path of a JSON file in open_clip's format.",
    )
    pretrained: str | None = Field(
        None,
        description=(
            "open_clip's tag (downloads), or a local checkpoint of the whole CLIP (OpenAI's or LAION's format)."
        ),
    )
    quick_gelu: bool | None = Field(
        None,
        description=(
            "CLIP's activation x sigmoid(1.702 x), which OpenAI's weights were trained with. Where not given, a run "
            "finds it from `pretrained` and keeps it, so that its exports are rebuilt with it."
        ),
    )
    mean: list[float] | None = Field(
        None,
        min_length=3,
        max_length=3,
        description=(
            "Of the three colours from 0 to 1, subtracted from pixels. Where not given, a run finds from `pretrained` "
            "how the tower was trained, and keeps it (else OpenAI's)."
        ),
    )
    std: list[Annotated[float, Field(gt=0)]] | None = Field(
        None, min_length=3, max_length=3, description="What they are divided by then; found as `mean` is."
    )
    tokenizer: str | None = Field(
        None,
        description=(
            "Folder with the files of the text tower's Hugging Face tokenizer; where not given, those of its "
            "architecture, which may be downloaded."
        ),
    )
    image_weights: str | None = Field(
        None, description="Local weights of the image tower alone (a timm model's, safetensors)."
    )
    temporal: Literal["transformer", "mean"] = Field(
        "transformer",
        description=(
            "`transformer` over the frames, with a residual around it, or `mean` (frames are left as they are)."
        ),
    )
    temporal_layers: int = Field(4, ge=1, le=64, description="Of the temporal transformer.")
    temporal_start: Literal["text", "random"] | None = Field(
        None,
        description=(
            "What its blocks begin as: copies of the text tower's first ones, of their activation too, where widths "
            "allow it (EMCL-Net's set-up), or `random`. Where not given, `text` with `model.pretrained`."
        ),
    )
    temporal_projection: bool = Field(
        False,
        description=(
            "A linear map after the temporal transformer, before the residual: EMCL-Net's for question answering."
        ),
    )
    head_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description=(
            "Share of a tower's output numbers that its head, the last projection, does not see in training. For those "
            "towers of a model that have a head of their own, as both of `lite0_minilm` and no CLIP's."
        ),
    )
    absent_frames: Literal["none", "grey"] = Field(
        "none",
        description=(
            "What stands for those that a short video lacks of `data.frames`: `none`, or `grey`, as in EMCL-Net's "
            "code: a picture of the mean colour, whose score counts in the softmax of poolings that mask afterwards."
        ),
    )
    frozen: list[str] = Field(
        default_factory=list,
        description=(
            "Parts that do not learn: `image`, `text` (the whole tower but for its last projection), or name prefixes."
        ),
    )
    cache_features: bool = Field(
        False,
        description="With both towers frozen: compute their outputs once, keep them beside the shards, train on those.",
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute the towers' activations in the backward pass, block by block."
    )
    regulariser: str = Field(
        "emcl",
        description=(
            "Of the tasks that compare texts with videos: `emcl`, or what an installed package brings; "
            "`emcl.enabled=false` does without any."
        ),
    )
    regulariser_options: dict[str, str] = Field(
        default_factory=dict, description="Settings of its own; those of `emcl` are `emcl.*`."
    )

    def blocks_start(self) -> Literal["text", "random"]:
        """What the temporal blocks begin as: `temporal_start`, or what it stands for where it is not given."""
        return self.temporal_start or ("text" if self.pretrained else "random")


@group
class EMCLConfig:
    """The EMCL layer, whose defaults are EMCL-Net's, and the shared factors, which are none of its."""

    enabled: bool = Field(True, description="`false` trains and scores without the layer, or any `model.regulariser`.")
    variant: Literal["reference", "compact"] = Field(
        "reference",
        description=(
            "`reference`, the published behaviour, or `compact`: distinct bases that a query alone is compared with "
            "too."
        ),
    )
    bases: Annotated[int, Formerly("k")] = Field(32, ge=1, description="Number of bases.")
    iterations: int = Field(9, ge=1, description="Of EM, each batch.")
    temperature: float = Field(1.0, gt=0, description="lambda, of the E-step's softmax (reference).")
    beta: float = Field(3.0, ge=0, description="Weight of the reconstruction that is added to a row.")
    balance: float = Field(
        0.5,
        ge=0,
        le=1,
        description="How equally the bases contribute: 0 keeps the features' spectrum, 1 makes it flat (compact).",
    )
    momentum: float = Field(
        0.9,
        ge=0,
        le=1,
        description="alpha, of the moving average: of the bases' start (reference), of the rows' moments (compact).",
    )
    factors: int = Field(
        128,
        ge=0,
        description=(
            "K, of the factors that videos and their sentences share. They are found after training, in pairs of the "
            "training split, and add to every score of a text and a video (docs/emcl.md); 0 does without. "
            "`enabled` and `variant` are the layer's alone."
        ),
    )
    factor_videos: Clips = Field(
        20_000, ge=2, description="Videos that they are found in, at most: evenly chosen, each with all its captions."
    )


@group
class Generation:
    """How captions are written; the names of transformers' `generate`, where its documentation says more."""

    num_beams: int = Field(5, ge=1, description="1 is greedy.")
    length_penalty: float = Field(1.0, description="Above 1 prefers longer captions, below shorter ones.")
    no_repeat_ngram_size: Tokens = Field(3, ge=0, description="No sequence of so many tokens twice; 0 allows it.")
    do_sample: bool = Field(False, description="Draw tokens by their probability; with `num_beams=1`.")
    temperature: float = Field(1.0, gt=0, description="Of the probabilities that are drawn from; with `do_sample`.")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Draw from the likeliest tokens that have this probability together; with `do_sample`.",
    )
    max_new_tokens: Tokens = Field(30, ge=1, description="Of the longest caption that is written.")
    use_cache: bool = Field(True, description="Keep each layer's keys and values.")
