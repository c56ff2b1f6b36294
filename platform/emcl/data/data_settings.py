"""Settings of shards and loaders; does not import PyTorch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from emcl.settings import Clips, Formerly, Frames, GiB, Pixels, Seconds, Tokens, Unit, group


@group
class DataConfig:
    """Shards and what is read from them."""

    root: str = Field(
        "shards", description="Folder of the shards, in recipes: `${data.root}` stands for it in the entries below."
    )
    train: str = Field(
        "shards/sample/train-{000000..000003}.tar",
        min_length=1,
        description="Brace pattern, glob or folder of WebDataset tars; several are joined by `::`.",
    )
    mixture: dict[str, Annotated[float, Field(gt=0, le=10**12)]] | None = Field(
        None,
        min_length=1,
        description=(
            "Several sets in place of `train`, by weight: `{msrvtt_frames: 3, sample: 1}`, each a file of configs/data "
            "or shards as in `train`."
        ),
    )
    val: str | None = Field(
        None,
        description=(
            "Scored while training; its score chooses the best model. A shard that `train` names too is not trained on."
        ),
    )
    test: str | None = Field(None, description="Scored once, at the end, with the best model.")
    generate: bool = Field(
        False, description="Render the sample set where its shards are missing, in a folder of the name `sample`."
    )
    frames: Frames = Field(12, ge=1, description="Of a video, evenly spread.")
    fps: Annotated[float, Unit("frames a second")] | None = Field(
        None, gt=0, description="Take no more frames than the video has seconds times this; null always takes all."
    )
    sampling: Literal["slices", "seconds"] = Field(
        "slices",
        description=(
            "`slices`: the middle frame of each of so many equal slices of the video; `seconds`: `fps` frames a second "
            "from the first one on, and of more than `frames` as many, first and last included, as in EMCL-Net's code."
        ),
    )
    keyframes: bool = Field(
        False,
        description=(
            "Take the last key frame of each slice of the video where there is one: on long videos several times the "
            "frames a second, at moments that are less even."
        ),
    )
    max_tokens: Annotated[Tokens, Formerly("words")] = Field(
        32, ge=2, description="Of a text, start and end token counted; longer ones are cut."
    )
    image_size: Annotated[Pixels, Formerly("size")] = Field(
        224, ge=1, description="Side of the square that the image tower gets."
    )
    resize: Literal["ffmpeg", "pil"] = Field(
        "ffmpeg",
        description=(
            "Who resizes frames and crops them: `ffmpeg`, or, slower, `pil`, whose pixels are those of torchvision's "
            "transforms. With `pil`, `data.augment` changes whole frames before, in the loaders' processes, as in "
            "EMCL-Net's code."
        ),
    )
    resize_mode: Literal["shortest", "squash"] | None = Field(
        None,
        description=(
            "`shortest`: the short side is resized and the centre cropped; `squash`: both sides are resized. Where not "
            "given, a run finds from `model.pretrained` how the tower was trained, and keeps it (else `shortest`)."
        ),
    )
    interpolation: Literal["bicubic", "bilinear"] | None = Field(
        None, description="Of resizing; where not given, found as `resize_mode` is (else `bicubic`)."
    )
    augment: str = Field(
        "none",
        description=(
            "`none`, or a timm RandAugment string such as `rand-m7-n4-mstd0.5-inc1`: timm's draw, the same for all "
            "frames of a clip, done on the training device (but for `data.resize=pil`)."
        ),
    )
    jitter: bool = Field(
        False, description="In training, draw each frame's time at random within its slice of the video."
    )
    pairs: Literal["clip", "caption", "question"] = Field(
        "clip",
        description=(
            "An epoch's samples: `clip` (each video once, its caption and questions drawn), `caption` or `question` "
            "(each of them once, with its video)."
        ),
    )
    captions_per_video: int | None = Field(
        None, ge=1, description="In training, the captions of a video that are used: the first so many, or all."
    )
    batch_size: Clips = Field(128, ge=1, description="Global batch: of all ranks and accumulation steps together.")
    workers: Annotated[int, Unit("processes")] = Field(1, ge=0, le=1024, description="Loader processes a rank.")
    cache_gib: GiB = Field(
        0.0,
        ge=0,
        le=10**6,
        description="Keep decoded frames in the loader's memory, up to this size a rank; for small sets.",
    )
    shuffle_buffer: Clips = Field(
        4096, ge=1, description="Samples drawn from, in training; whole shards are shuffled besides."
    )
    max_bad_fraction: float = Field(
        0.001,
        ge=0,
        le=1,
        description=(
            "Share of a split's samples that may be damaged or not decode; with more of them a run stops and lists "
            "them."
        ),
    )
    patience: Seconds = Field(
        300.0,
        gt=0,
        description=(
            "Loaders may take so long for one batch before the run ends, naming the worker and what it reads."
        ),
    )

    def __post_init__(self) -> None:
        if self.sampling == "slices":
            return
        if self.fps is None:
            raise ValueError("sampling=seconds wants data.fps, such as data.fps=1")
        if self.jitter or self.keyframes:
            raise ValueError("sampling=seconds excludes data.jitter and data.keyframes, which choose within slices")
