"""Every setting, its type and its default; YAML files and `key=value` overrides on top.

A recipe is a YAML file of configs/recipe/. It may `include:` other files of configs/ (`model/vit_b_32`), which
are merged in order before it. Overrides come last. Unknown keys and ill-typed values are errors that name the key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from emcl.errors import UserError, first_line
from emcl.registry import expand, nearest, settings_class, task_class
from emcl.shipped import find_architecture, find_file

DEFAULT_RECIPE = "sample"
EMCL_VARIANTS = ("reference", "compact")
"""As em.py has them; written here too, so that reading a configuration does not import torch."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shared backbone."""

    name: str = "ViT-B-32"
    """An open_clip configuration, or the path of a JSON file in open_clip's format."""
    pretrained: str | None = None
    """open_clip's tag (downloads), or a local checkpoint of the whole CLIP (OpenAI's or LAION's format)."""
    quick_gelu: bool | None = None
    """CLIP's activation x sigmoid(1.702 x), which OpenAI's weights were trained with. Where not given, a run finds it
    from `pretrained` and keeps it, so that its exports are rebuilt with it."""
    image_weights: str | None = None
    """Local weights of the image tower alone (a timm model's, safetensors)."""
    temporal: str = "transformer"
    """`transformer` over the frames, with a residual around it, or `mean` (frames are left as they are)."""
    temporal_layers: int = 4
    frozen: list[str] = field(default_factory=list)
    """Parts that do not learn: `image`, `text` (the whole tower but for its last projection), or name prefixes."""
    cache_features: bool = False
    """With both towers frozen: compute their outputs once, keep them beside the shards, train on those."""
    activation_checkpointing: bool = False
    """Recompute the towers' activations in the backward pass, block by block."""

    def __post_init__(self) -> None:
        _one_of("model.temporal", self.temporal, ("transformer", "mean"))


@dataclass(frozen=True, kw_only=True)
class EMCLConfig:
    """The EMCL layer; the defaults are EMCL-Net's."""

    enabled: bool = True
    variant: str = "reference"
    """`reference`, the published behaviour, or `compact`: distinct bases that a query alone is compared with too."""
    k: int = 32
    """Number of bases."""
    iterations: int = 9
    temperature: float = 1.0
    """lambda, of the E-step's softmax (reference)."""
    beta: float = 3.0
    """Weight of the reconstruction that is added to a row."""
    balance: float = 0.5
    """How equally the bases contribute: 0 keeps the features' spectrum, 1 makes it flat (compact)."""
    momentum: float = 0.9
    """alpha, of the moving average: of the bases' start (reference), of the rows' moments (compact)."""

    def __post_init__(self) -> None:
        _one_of("emcl.variant", self.variant, EMCL_VARIANTS)
        _at_least("emcl.k", self.k, 1)
        _at_least("emcl.iterations", self.iterations, 1)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Shards and what is read from them."""

    root: str = "shards"
    """Folder of the shards, in recipes: `${data.root}` stands for it in the entries below."""
    train: str = "shards/sample/train-{000000..000003}.tar"
    """Brace pattern, glob or folder of WebDataset tars; several are joined by `::`."""
    mixture: dict[str, float] | None = None
    """Several sets in place of `train`, by weight: `{msrvtt_frames: 3, sample: 1}`, each a file of configs/data or
    shards as in `train`."""
    val: str | None = None
    """Scored while training; its score chooses the best model."""
    test: str | None = None
    """Scored once, at the end, with the best model."""
    generate: bool = False
    """Render the sample set where its shards are missing, in a folder of the name `sample`."""
    frames: int = 12
    """Frames a video, evenly spread."""
    fps: float | None = None
    """Take no more frames than the video has seconds times this; None always takes all."""
    keyframes: bool = False
    """Take the last key frame of each slice of the video where there is one: on long videos several times the frames a
    second, at moments that are less even."""
    words: int = 32
    """Text tokens, start and end token counted."""
    size: int = 224
    """Square side in pixels that the image tower gets."""
    augment: str = "none"
    """`none`, or a timm RandAugment string such as `rand-m7-n4-mstd0.5-inc1`: timm's draw, the same for all frames of a
    clip, done on the training device."""
    jitter: bool = False
    """In training, draw each frame's time at random within its slice of the video."""
    pairs: str = "clip"
    """An epoch's samples: `clip` (each video once, one caption drawn) or `caption` (each caption a pair)."""
    captions_per_video: int | None = None
    """In training, the captions of a video that are used: the first so many, or all."""
    batch_size: int = 128
    """Global batch: of all ranks and accumulation steps together."""
    workers: int = 1
    """Loader processes a rank."""
    cache_gib: float = 0.0
    """Keep decoded frames in the loader's memory, up to this size a rank; for small sets."""
    shuffle_buffer: int = 4096
    """Samples drawn from, in training; whole shards are shuffled besides."""
    max_bad_fraction: float = 0.001
    """Share of a split's samples that may be damaged or not decode; with more of them a run stops and lists them."""
    patience: float = 300.0
    """Seconds that loaders may take for one batch before the run ends, naming the worker and what it reads."""

    def __post_init__(self) -> None:
        _one_of("data.pairs", self.pairs, ("clip", "caption"))
        if self.mixture is not None and (not self.mixture or min(self.mixture.values()) <= 0):
            raise ValueError("data.mixture wants at least one set, and weights above 0")
        for name in ("frames", "words", "size", "batch_size", "shuffle_buffer"):
            _at_least(f"data.{name}", getattr(self, name), 1)
        _at_least("data.workers", self.workers, 0)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with EMCL-Net's groups and schedule."""

    lr: float = 1e-4
    """For the new modules."""
    clip_lr: float = 1e-7
    """For CLIP's towers."""
    weight_decay: float = 0.2
    """Not on biases, norms and scales."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    grad_clip: float = 1.0
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises; a cosine follows."""
    epochs: int = 5
    max_steps: int | None = None
    """Stop earlier."""
    max_skipped: int = 10
    """Steps in a row whose gradient may be not finite (they are left out, on all ranks) before training stops."""
    accumulation: int = 1
    """Micro-batches a step; negatives come from the micro-batch of all ranks."""

    def __post_init__(self) -> None:
        _at_least("optim.epochs", self.epochs, 1)
        _at_least("optim.accumulation", self.accumulation, 1)
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"optim.warmup is a share of the steps, between 0 and 1, not {self.warmup}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    every_epochs: int = 1
    """Validate after so many epochs; the test set is scored once, at the end, with the best model."""
    batch_size: int = 32
    tile: int = 32
    """Texts x videos that meet the reference EMCL together; its scores depend on this (docs/emcl.md)."""
    dsl: bool = False
    """Also report the dual softmax (transductive: it uses all test queries together)."""
    dsl_temperature: float = 0.01
    shuffle_frames: bool = False
    """Score with every video's frames in a random order, to see whether order matters."""
    swap_videos: bool = False
    """Score with the videos dealt out anew among the samples: a control, which says what is known without them."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 1000
    keep: int = 2
    """The newest so many are kept."""


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    enabled: bool = True
    experiment: str = "emcl"
    every_steps: int = 10
    profile: int = 0
    """Profile so many steps after the first few: a trace and a summary (`--profile N`)."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run."""

    seed: int = 0
    """Of weights, order, captions, augmentation."""
    name: str | None = None
    """Of the run; made from task and time where not given."""
    runs: str = "runs"
    """Folder of all runs."""
    precision: str = "fp32"
    """`fp32`, `bf16` or `fp16`."""
    tf32: bool = False
    """On GPUs, products and convolutions of fp32 numbers in TF32: several times as fast, with 10 of their 23 bits.
    EMCL's own stay exact."""
    deterministic: bool = False
    """On GPUs, the same bits in every run on the same machines, as on CPUs anyway (docs/operations.md)."""
    patience: float = 600.0
    """Seconds in which some rank has to get on (with a step, a batch of an evaluation, a video's features) before the
    run ends, naming the rank that the others wait for; six times that for what does not say how it gets on, such as
    saving. A rank that gives no sign of life for 20 seconds is named at once."""
    deepspeed: str = "deepspeed/zero1.json"
    """A DeepSpeed JSON file: a path, or one of configs/. Batch size, precision and clipping come from here."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """Settings of each active task; the task's own class says which."""
    uncertainty_weights: bool = False
    """Weigh the tasks' losses by learned uncertainties (Kendall et al., CVPR 2018), besides their `weight`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    emcl: EMCLConfig = field(default_factory=EMCLConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, ("fp32", "bf16", "fp16"))


def resolve(tasks: Sequence[str] | None, recipe: str = DEFAULT_RECIPE, overrides: Iterable[str] = ()) -> Config:
    """Defaults, then the recipe and what it includes, then `key=value` overrides, for the named tasks.

    Without `tasks`, those that the recipe has settings for.

    Raises:
        UserError: unknown task, recipe or key, ill-typed or impossible value.
    """
    path = find_file(recipe, "recipe")
    layers = [_load_yaml(path), parse_overrides(overrides)]
    config = from_dict(layers, tasks, source=str(path))
    if not config.tasks:
        raise UserError(f"{path} names no tasks: give --task")
    return config


def check_settings(tasks: Sequence[str] | None, recipe: str | None, overrides: Iterable[str]) -> Config:
    """Finds what is wrong with keys, values and names at once: PyTorch, which takes seconds, stays away.

    Returns:
        As `resolve`, but for the settings of tasks.

    Raises:
        UserError: as `resolve` does; or no such architecture or DeepSpeed file.
    """
    layers = [_load_yaml(find_file(recipe, "recipe"))] if recipe else []
    source = recipe or "config"
    config = from_dict([*layers, parse_overrides(overrides)], tasks, source=source, settings_of=settings_class)
    find_architecture(config.model.name)
    find_file(config.deepspeed, "deepspeed")
    return config


def _settings_of(name: str) -> Any:
    return task_class(name).config_class


def from_dict(
    layers: Sequence[Any],
    tasks: Sequence[str] | None = None,
    *,
    source: str = "config",
    settings_of: Callable[[str], Any] = _settings_of,
) -> Config:
    """A checked Config from plain dictionaries merged in order; `tasks` are taken from them where not given.

    `settings_of` gives the class of a task's settings; those of which it gives none are left out.
    """
    merged: Any = OmegaConf.create({})
    for layer in layers:
        merged = OmegaConf.merge(merged, layer)
    given = merged.get("tasks") if isinstance(merged.get("tasks"), DictConfig) else {}
    names = expand(tasks) if tasks is not None else list(given)
    kinds = {name: settings_of(name) for name in [*names, *given]}
    for name in list(given):  # a recipe may hold settings for tasks that this run leaves out
        if name not in names or kinds[name] is None:
            del given[name]
    base = OmegaConf.structured(Config)
    _unlock(base)
    base.tasks = {name: OmegaConf.structured(kinds[name]) for name in names if kinds[name] is not None}
    _unlock(base)
    return _checked(base, merged, source)


def _checked(base: DictConfig, merged: DictConfig, source: str) -> Config:
    """`merged` over the schema `base`.

    Raises:
        UserError: a key that the schema lacks, or a value that it does not take.
    """
    try:
        whole = OmegaConf.merge(base, merged)
        config = OmegaConf.to_object(whole)
    except (ConfigAttributeError, ConfigKeyError) as error:
        raise UserError(_unknown_key(error, base)) from None
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise UserError(f"{key}: {first_line(error)} ({source} and overrides)") from None
    except ValueError as error:
        raise UserError(str(error)) from None
    assert isinstance(config, Config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration, readable by `from_dict`."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def flatten(config: Config) -> dict[str, Any]:
    """`{"optim.lr": 1e-4, ...}`, for MLflow's parameters."""

    def walk(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        else:
            yield prefix, value

    return dict(walk("", dataclasses.asdict(config)))


def _load_yaml(path: Path) -> DictConfig:
    try:
        content = OmegaConf.load(path)
    except Exception as error:  # yaml's errors span several lines
        raise UserError(f"{path} is not readable YAML: {first_line(error)}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"{path} holds no `key: value` settings")
    merged: Any = OmegaConf.create({})
    for name in content.pop("include", []):
        merged = OmegaConf.merge(merged, _load_yaml(find_file(name, name.partition("/")[0])))
    return OmegaConf.merge(merged, content)  # type: ignore[return-value]


def parse_overrides(overrides: Iterable[str]) -> DictConfig:
    overrides = list(overrides)
    for item in overrides:
        if "=" not in item or item.startswith("-"):
            raise UserError(
                f"override {item!r} is not key=value, such as optim.lr=1e-4 (options start with --, see --help)"
            )
    nodes: Any = OmegaConf.create({})
    for item in overrides:
        key, _, value = item.partition("=")
        if "{" in value and "..." not in value and ".." in value:  # a brace pattern of shards, not a YAML mapping
            OmegaConf.update(nodes, key, value)
        else:
            try:
                nodes = OmegaConf.merge(nodes, OmegaConf.from_dotlist([item]))
            except Exception as error:
                raise UserError(f"override {item!r} is not readable: {first_line(error)}") from None
    return nodes


def _unlock(node: Any) -> None:
    """Frozen dataclasses become read-only nodes, which could not be merged into."""
    if isinstance(node, DictConfig):
        OmegaConf.set_readonly(node, False)
        for key in node:
            _unlock(node._get_node(key))


def _unknown_key(error: Any, base: DictConfig) -> str:
    full = str(getattr(error, "full_key", None) or getattr(error, "key", "?"))
    parent, _, last = full.rpartition(".")
    node = OmegaConf.select(base, parent) if parent else base
    known = [str(key) for key in node] if isinstance(node, DictConfig) else []
    return f"unknown configuration key {full!r}{nearest(last, known)} (keys here: {', '.join(known)})"


def _one_of(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key}={value} is none of {', '.join(known)}{nearest(value, list(known))}")


def _at_least(key: str, value: float, least: float) -> None:
    if not value >= least or math.isnan(value):
        raise ValueError(f"{key}={value} is below {least}")
