"""The JSON file of `deepspeed=`; without PyTorch, so that an error comes at once."""

from __future__ import annotations

import json
from typing import Any

from emcl.config import Config
from emcl.errors import UserError
from emcl.resources import find_file

OURS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "fp16",
    "bf16",
)
"""Keys that only the run's configuration may set."""
STAGES = range(4)


def read_deepspeed(config: Config) -> dict[str, Any]:
    """Reads and checks the file.

    Raises:
        UserError: no such file, no JSON, or it sets what the configuration sets.
    """
    path = find_file(config.deepspeed, "deepspeed")
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no settings of DeepSpeed, such as {{'zero_optimization': {{'stage': 1}}}}")
    for key in OURS:
        if key in settings:
            raise UserError(
                f"{path} sets {key!r}, which comes from the configuration: remove it there (see docs/configuration.md)"
            )
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError(f"{path}: zero_optimization={zero} is no table, such as {{'stage': 1}}")
    stage = stage_of(settings)
    if isinstance(stage, bool) or stage not in STAGES:
        raise UserError(f"{path}: zero_optimization.stage={stage!r} is not one of {', '.join(map(str, STAGES))}")
    if config.precision == "clip_fp16" and stage != 0:
        raise UserError(
            f"precision=clip_fp16 keeps no fp32 weights, as ZeRO {stage} ({path}) would: give "
            "deepspeed=deepspeed/zero0.json"
        )
    if config.precision == "fp16" and stage == 0:
        # without ZeRO, DeepSpeed 0.19.8 divides gradients by a scale that the loss was never multiplied by
        raise UserError(f"precision=fp16 trains wrong without ZeRO ({path}): give deepspeed=deepspeed/zero1.json")
    return settings


def stage_of(settings: dict[str, Any]) -> int:
    """The ZeRO stage in a DeepSpeed file's settings; 0 if it names none."""
    return settings.get("zero_optimization", {}).get("stage", 0)


def zero_stage(config: Config) -> int:
    """The run's ZeRO stage.

    Raises:
        UserError: as `read_deepspeed` does.
    """
    return stage_of(read_deepspeed(config))
