"""What a run would do, without doing it: `deepspeed platform/launch.py --recipe NAME --dry-run`.

The model is built on the meta device: it takes no memory, and no weights are read or downloaded. Memory is that of the
real step, run on fake tensors (train/fake_step.py).
"""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from emcl.components import BACKBONES, check_components
from emcl.config import Config
from emcl.data.mixture import training_patterns
from emcl.data.samples import Sample
from emcl.data.shard_checks import missing, wanted
from emcl.data.shards import open_shards
from emcl.data.split import open_training_split
from emcl.metrics.rescoring import check_rescoring
from emcl.model.backbone import backbone_class
from emcl.multitask import VideoLanguageModel
from emcl.registry import task_class
from emcl.resources import find_file
from emcl.train.deepspeed_file import zero_stage
from emcl.train.engine import deepspeed_settings
from emcl.train.fake_cuda import NoFakeCudaError, fused_attention, in_clean_process
from emcl.train.fake_step import (
    BUFFERS,
    DTYPES,
    GRADIENTS,
    PARAMETERS,
    FakeStep,
    build_on_meta,
    fake_steps,
)
from emcl.train.initialization import learn_settings
from emcl.train.one_sample import for_one_sample
from emcl.train.optimizer import optimizer_class, parameter_groups

GIB = 2**30
GPUS = (1, 8, 64)
STAGES = (0, 1, 2, 3)
EXAMPLES = 128
"""Training samples at most that make the planned batch, those with the longest captions."""


@dataclass(frozen=True)
class Plan:
    """Counts of a run; those of the data are None where its shards are missing."""

    parameters: int
    trained: int
    groups: dict[str, tuple[int, float]]
    """Optimiser groups: number of weights, and learning rate."""
    missing: list[str]
    samples: int | None = None
    steps_per_epoch: int | None = None
    steps: int | None = None
    test: int | None = None
    activations: float = 0.0
    """Bytes that the towers keep of one video and one caption for the backward pass; an estimate for torch versions
    on which the step itself cannot be planned."""
    examples: Sequence[Sample] = ()
    bytes_of_mixed: tuple[int, int] | None = None
    """Bytes of all weights and of the trained ones, where some are in half precision (`clip_fp16`)."""


def plan(config: Config) -> tuple[Plan, Config]:
    """What `config` would train, and the configuration with the tasks' vocabularies, guessed where shards are missing.

    Raises:
        UserError: something other than shards that the configuration names is missing or does not fit.
    """
    check_components(config)
    check_rescoring(config.evaluate.rescoring, config.evaluate.rescoring_options)
    backbone = backbone_class(config.model)
    backbone.check(config)
    weights = backbone.missing_weights(config.model)
    lacking = [*missing(wanted(config.data, training=True)), *weights]
    samples = steps_per_epoch = steps = test = None
    examples: list[Sample] = []
    if not missing(list(training_patterns(config.data))):
        training = open_training_split(config.data, config.seed)
        assert training.sampler is not None
        config = learn_settings(config, training) if not weights else config
        samples, steps_per_epoch = len(training), training.sampler.steps_per_epoch
        examples = heapq.nlargest(EXAMPLES, (row.sample for row in training.shards.rows), key=_longest_caption)
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
    activations = activation_bytes(model, config)
    mixed = None
    if config.precision == "clip_fp16":
        sizes = [(weight.nbytes, weight.requires_grad) for weight in model.parameters()]
        mixed = sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)
    run_plan = Plan(
        parameters=sum(weight.numel() for weight in model.parameters()),
        trained=sum(count for count, _ in groups.values()),
        groups=groups,
        missing=lacking,
        samples=samples,
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        test=test,
        activations=activations,
        examples=examples,
        bytes_of_mixed=mixed,
    )
    return run_plan, config


def activation_bytes(model: VideoLanguageModel, config: Config) -> float:
    """Bytes that autograd keeps of one video and one caption in the backbone, counted on the meta device.

    Heads and the similarity come on top; they are small beside it at the batches of the recipes. NaN for another
    package's backbone that cannot run there, such as one that reads tensor values.
    """
    if config.precision == "clip_fp16":
        model.backbone.keep_matrices_in_half()
    else:
        model.to(DTYPES[config.precision])
    backbone = model.backbone.train()
    videos, text = for_one_sample(backbone, config)
    weights = {weight.untyped_storage()._cdata for weight in backbone.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with fused_attention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        try:
            alive = backbone.encode_video(videos), backbone.encode_text(text)
        except (RuntimeError, ValueError):
            if config.model.backbone in BACKBONES.built_in:
                raise
            return math.nan
    del alive
    return float(sum(storage.nbytes() for storage in kept.values()))


def state_gib(plan: Plan, config: Config, stage: int, gpus: int) -> float:
    """GiB of weights, gradients and the optimiser's state on one GPU.

    ZeRO 1 shards the optimiser's state, 2 the gradients too, 3 the weights too (Rajbhandari et al., SC 2020).
    """
    weights, gradients = _bytes(plan, config)
    shared = [gradients if stage >= 2 else 0, weights if stage >= 3 else 0]
    whole = weights + gradients - sum(shared) + sum(shared) / gpus
    return (whole + _optimizer_bytes(plan, config, stage, gpus)) / GIB


def _bytes(plan: Plan, config: Config) -> tuple[int, int]:
    """Of all weights, and of the trained ones or their gradients."""
    if plan.bytes_of_mixed is not None:
        return plan.bytes_of_mixed
    number = DTYPES[config.precision].itemsize
    return number * plan.parameters, number * plan.trained


def _optimizer_bytes(plan: Plan, config: Config, stage: int, gpus: int) -> float:
    """The optimiser's own state (Adam's two moments); in half precision also fp32 weights, but for `clip_fp16`."""
    numbers = optimizer_class(config.optim).numbers_kept
    if plan.bytes_of_mixed is not None:
        return numbers * plan.bytes_of_mixed[1]
    return 4 * (numbers + (config.precision != "fp32")) * plan.trained / (gpus if stage >= 1 else 1)


def _stages(config: Config) -> Sequence[int]:
    """ZeRO's stages at which the run could train."""
    return STAGES[:1] if config.precision == "clip_fp16" else STAGES


def bucket_bytes(zero: Mapping[str, Any], parameters: int, number: int) -> int:
    """Bytes of DeepSpeed 0.19's communication buckets, besides a step's own tensors.

    Stages 1 and 2 allocate the whole reduction bucket, whatever the model's size, and a second one where communication
    overlaps the backward pass; `allgather_bucket_size` only splits messages of weights in place. Stage 3 has one
    reduction bucket, and gathers weights up to `stage3_max_live_parameters`, prefetched ones included. Stage 0 copies
    gradients into one buffer after the backward pass, when the activations are freed.

    Args:
        zero: `zero_optimization` of the DeepSpeed file.
        parameters: number of the model's parameters.
        number: bytes of one parameter.
    """
    stage = int(zero.get("stage", 0))
    if stage == 0:
        return 0
    bucket = int(zero.get("reduce_bucket_size", 5e8))
    if not zero.get("contiguous_gradients", True):  # gradients are copied together when a bucket is full
        bucket = min(bucket, parameters)
    if stage == 3:
        return number * (bucket + min(parameters, int(zero.get("stage3_max_live_parameters", 1e9))))
    return number * bucket * (2 if zero.get("overlap_comm") else 1)


def zero_settings(config: Config, stage: int) -> dict[str, Any]:
    """`zero_optimization` of the run's DeepSpeed file if it has this stage, else of the shipped file for the stage."""
    name = config.deepspeed if zero_stage(config) == stage else f"deepspeed/zero{stage}.json"
    return dict(json.loads(find_file(name, "deepspeed").read_text()).get("zero_optimization", {}))


def planned_steps(run_plan: Plan, config: Config, gpus: Sequence[int] = GPUS) -> dict[int, FakeStep]:
    """The step of one rank by number of GPUs, run on fake tensors in a separate process.

    Raises:
        NoFakeCudaError: this torch does not support it.
    """
    sizes = [(count, _videos(config, count)) for count in gpus]
    return dict(zip(gpus, in_clean_process(fake_steps, config, sizes, run_plan.examples), strict=True))


def planned_peak(config: Config, gpus: int) -> float | None:
    """Bytes of one GPU at the peak of a step; None where this torch cannot plan it."""
    run_plan, config = plan(config)
    try:
        step = planned_steps(run_plan, config, [gpus])[gpus]
    except NoFakeCudaError:
        return None
    return sum(memory_parts(run_plan, step, config, zero_stage(config), gpus).values())


def memory_parts(run_plan: Plan, step: FakeStep, config: Config, stage: int, gpus: int) -> dict[str, float]:
    """Bytes of one GPU at the peak of a step, by owner."""
    several = config.optim.accumulation > 1
    held = dict(step.held_without_gradients if stage >= 2 or several else step.held)
    gradients: float = held.pop(GRADIENTS, 0)
    if stage >= 2:
        gradients = step.gradients / gpus
    elif several:  # those of earlier micro-batches are still allocated
        gradients = step.gradients
    weights = held.pop(PARAMETERS)
    buckets = 0
    if stage:
        buckets = bucket_bytes(zero_settings(config, stage), run_plan.parameters, DTYPES[config.precision].itemsize)
    return {
        "weights": (weights / gpus if stage == 3 else weights) + held.pop(BUFFERS),
        "gradients": gradients,
        "optimiser": _optimizer_bytes(run_plan, config, stage, gpus),
        "buckets": buckets,
        **held,
    }


def describe_plan(config: Config) -> str:
    """The plan as text.

    Raises:
        UserError: as `plan`.
    """
    run_plan, config = plan(config)
    deepspeed_settings(config, 1)
    data = config.data
    lines = [f"tasks: {', '.join(config.tasks)}", f"model: {config.model.name}, {config.precision}, {config.deepspeed}"]
    lines.append(f"weights: {run_plan.parameters / 1e6:.1f} M, {run_plan.trained / 1e6:.1f} M of them trained")
    for name, (count, rate) in run_plan.groups.items():
        lines.append(f"  {name:<18}{count / 1e6:9.1f} M at {rate:g}")
    if run_plan.samples is None:
        lines.append(f"training: its shards are missing; {config.optim.epochs} epochs of batches of {data.batch_size}")
    else:
        lines.append(
            f"training: {run_plan.samples:,} videos, {run_plan.steps_per_epoch:,} steps an epoch of {data.batch_size} "
            f"({data.pairs}s), {run_plan.steps:,} steps in all"
        )
    if run_plan.test is not None:
        lines.append(f"test: {run_plan.test:,} videos")
    try:
        lines += _memory_lines(run_plan, config, planned_steps(run_plan, config))
    except NoFakeCudaError as error:
        lines += [
            f"activations not planned: {error}; estimated from the towers alone",
            *_estimate_lines(run_plan, config),
        ]
    lines += [f"missing: {item}" for item in run_plan.missing]
    return "\n".join(lines)


def _memory_lines(run_plan: Plan, config: Config, steps: Mapping[int, FakeStep]) -> list[str]:
    """The table by GPUs and stages, and what holds the memory at the run's own stage."""
    lines = ["GiB a GPU at the peak of a step, planned on fake tensors, buckets of DeepSpeed included:"]
    stages = _stages(config)
    lines.append("  GPUs  videos of each" + "".join(f"  ZeRO {stage}" for stage in stages))
    for gpus, step in steps.items():
        peaks = [sum(memory_parts(run_plan, step, config, stage, gpus).values()) / GIB for stage in stages]
        lines.append(f"{gpus:>6}{_videos(config, gpus):>16}" + "".join(f"{peak:8.2f}" for peak in peaks))
    lines.append(f"of it, with {config.deepspeed}:")
    for gpus, step in steps.items():
        usage = memory_parts(run_plan, step, config, zero_stage(config), gpus)
        named = [f"{name} {size / GIB:.2f}" for name, size in usage.items() if size >= 0.005 * GIB]
        lines.append(f"{gpus:>6}  {', '.join(named)}")
    lines += sorted({f"odd: {odd}" for step in steps.values() for odd in step.odd})
    return lines


def _estimate_lines(run_plan: Plan, config: Config) -> list[str]:
    lines = ["GiB a GPU for weights, gradients and optimiser; and for the towers' activations, which come on top:"]
    stages = _stages(config)
    lines.append("  GPUs" + "".join(f"  ZeRO {stage}" for stage in stages) + "   activations (videos a GPU and step)")
    for gpus in GPUS:
        cells = "".join(f"{state_gib(run_plan, config, stage, gpus):8.2f}" for stage in stages)
        videos = _videos(config, gpus)
        lines.append(f"{gpus:>6}{cells}{videos * run_plan.activations / GIB:14.2f} ({videos})")
    return lines


def _videos(config: Config, gpus: int) -> int:
    """Videos of one GPU in one micro-batch."""
    return -(-config.data.batch_size // (gpus * config.optim.accumulation))


def _longest_caption(sample: Sample) -> int:
    return max(map(len, sample.captions), default=0)


def _with_guesses(config: Config) -> Config:
    """`config` with the tasks' guesses for their vocabularies and similar settings."""
    tasks = {
        name: task_class(config.kind_of(name)).placeholder_settings(settings, config)
        for name, settings in config.tasks.items()
    }
    return dataclasses.replace(config, tasks=tasks)
