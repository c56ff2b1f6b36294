"""What a run would do, without doing it: `deepspeed platform/launch.py --recipe NAME --dry-run`.

The model is built on the meta device: it takes no memory, and no weights are read or downloaded.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from emcl.config import Config
from emcl.data.at_hand import missing, wanted
from emcl.data.mixture import open_training, training_patterns
from emcl.data.shards import open_shards
from emcl.data.vocabulary import UsedTokens
from emcl.model.towers import missing_weights
from emcl.multitask import VideoLanguageModel
from emcl.train.engine import deepspeed_settings
from emcl.train.optimizer import parameter_groups
from emcl.train.start import learn_settings

GIB = 2**30
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Plan:
    """Counts of a run; those of the data are None where its shards are missing."""

    parameters: int
    trained: int
    groups: dict[str, tuple[int, float]]
    """Of the optimiser: weights, and learning rate."""
    missing: list[str]
    samples: int | None = None
    steps_per_epoch: int | None = None
    steps: int | None = None
    test: int | None = None
    activations: float = 0.0
    """Bytes that the towers keep of one video and one caption for the backward pass."""


def plan(config: Config) -> tuple[Plan, Config]:
    """What `config` would train, and the configuration with the tasks' vocabularies, guessed where shards are missing.

    Raises:
        UserError: what the configuration names is not there, or does not fit, other than shards.
    """
    weights = missing_weights(config.model)
    lacking = [*missing(wanted(config.data, training=True)), *weights]
    samples = steps_per_epoch = steps = test = None
    if not missing(list(training_patterns(config.data))):
        shards, order = open_training(config.data, config.seed)
        config = learn_settings(config, shards) if not weights else config
        samples, steps_per_epoch = len(shards), order.steps_per_epoch
        steps = min(config.optim.epochs * steps_per_epoch, config.optim.max_steps or 2**62)
    else:
        config = _with_guesses(config)
    if config.data.test and not missing([config.data.test]):
        test = len(open_shards(config.data.test))
    model = build_on_meta(config)
    groups = {
        str(group["name"]): (sum(weight.numel() for weight in group["params"]), float(group["lr"]))
        for group in parameter_groups(model.named_parameters(), config.optim)
    }
    found = Plan(
        parameters=sum(weight.numel() for weight in model.parameters()),
        trained=sum(count for count, _ in groups.values()),
        groups=groups,
        missing=lacking,
        samples=samples,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        test=test,
        activations=activation_bytes(model, config),
    )
    return found, config


def build_on_meta(config: Config) -> VideoLanguageModel:
    with torch.device("meta"):
        return VideoLanguageModel(config, load_weights=False)


def activation_bytes(model: VideoLanguageModel, config: Config) -> float:
    """What autograd keeps of one video and one caption in the towers and over time, counted on the meta device.

    Heads and the similarity come on top; they are small beside it at the batches of the recipes.
    """
    precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    backbone = model.to(precision).backbone.train()
    weights = {weight.untyped_storage()._cdata for weight in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other storage gets its number
        return tensor

    data = config.data
    frames = torch.zeros(data.frames, data.size, data.size, 3, dtype=torch.uint8, device="meta")
    text = torch.zeros(1, data.words, dtype=torch.long, device="meta")
    if config.model.cache_features:
        frames = torch.zeros(data.frames, backbone.image.width, device="meta")
        text = torch.zeros(1, backbone.text.width, device="meta")
    slots = torch.arange(data.frames, device="meta")
    mask = torch.ones(1, data.frames, dtype=torch.bool, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = backbone.encode_video(frames, slots, mask), backbone.encode_text(text)
    del alive
    return float(sum(storage.nbytes() for storage in kept.values()))


def state_gib(plan: Plan, precision: str, stage: int, gpus: int) -> float:
    """Weights, gradients and Adam's state of one GPU.

    ZeRO 1 shares the optimiser's state, 2 the gradients too, 3 the weights too (Rajbhandari et al., SC 2020). In half
    precision the optimiser holds weights in single precision besides its two moments.
    """
    number = 4 if precision == "fp32" else 2
    weights, gradients = number * plan.parameters, number * plan.trained
    optimizer = (8 if precision == "fp32" else 12) * plan.trained
    shared = [optimizer if stage >= 1 else 0, gradients if stage >= 2 else 0, weights if stage >= 3 else 0]
    return (weights + gradients + optimizer - sum(shared) + sum(shared) / gpus) / GIB


def describe_plan(config: Config) -> str:
    """The plan as text.

    Raises:
        UserError: as `plan`.
    """
    found, config = plan(config)
    deepspeed_settings(config, 1)
    data = config.data
    lines = [f"tasks: {', '.join(config.tasks)}", f"model: {config.model.name}, {config.precision}, {config.deepspeed}"]
    lines.append(f"weights: {found.parameters / 1e6:.1f} M, {found.trained / 1e6:.1f} M of them trained")
    for name, (count, rate) in found.groups.items():
        lines.append(f"  {name:<14}{count / 1e6:9.1f} M at {rate:g}")
    if found.samples is None:
        lines.append(f"training: its shards are missing; {config.optim.epochs} epochs of batches of {data.batch_size}")
    else:
        lines.append(
            f"training: {found.samples:,} videos, {found.steps_per_epoch:,} steps an epoch of {data.batch_size} "
            f"({data.pairs}s), {found.steps:,} steps in all"
        )
    if found.test is not None:
        lines.append(f"test: {found.test:,} videos")
    lines.append("GiB a GPU for weights, gradients and optimiser; and for the towers' activations, which come on top:")
    lines.append("  GPUs" + "".join(f"  ZeRO {stage}" for stage in range(4)) + "   activations (videos a GPU and step)")
    for gpus in GPUS:
        cells = "".join(f"{state_gib(found, config.precision, stage, gpus):8.2f}" for stage in range(4))
        videos = -(-data.batch_size // (gpus * config.optim.accumulation))
        lines.append(f"{gpus:>6}{cells}{videos * found.activations / GIB:14.2f} ({videos})")
    lines += [f"missing: {item}" for item in found.missing]
    return "\n".join(lines)


def _with_guesses(config: Config) -> Config:
    """Vocabularies of the size that the settings allow, for counting weights."""
    tasks = {}
    for name, settings in config.tasks.items():
        learned: dict[str, object] = {}
        if hasattr(settings, "answers_kept") and settings.answers is None:
            learned["answers"] = [str(number) for number in range(settings.answers_kept)]
        if hasattr(settings, "captions_per_video") and settings.vocabulary is None and settings.pretrained is None:
            learned["vocabulary"] = UsedTokens.of_captions(settings.tokenizer, ["a video"])
        tasks[name] = dataclasses.replace(settings, **learned) if learned else settings
    return dataclasses.replace(config, tasks=tasks)
