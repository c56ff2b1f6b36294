"""The DeepSpeed engine, driven directly (accelerate's reductions are wrong with DeepSpeed on CPUs)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from emcl.config import Config
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.regulariser import Regulariser
from emcl.multitask import VideoLanguageModel
from emcl.train.deepspeed_file import read_deepspeed, stage_of
from emcl.train.gradient_norm import take_norms_at_once
from emcl.train.optimizer import build_optimizer, check_optimizer, optimizer_class
from emcl.train.schedule import build_schedule


def deepspeed_settings(config: Config, world_size: int) -> dict[str, Any]:
    """The JSON file of `deepspeed=`, completed by batch size, precision and clipping.

    Raises:
        UserError: as `read_deepspeed` and the optimiser's `check` do; or the device does not support the precision.
    """
    settings = read_deepspeed(config)
    accelerator = deepspeed.accelerator.get_accelerator()
    if config.precision == "fp16" and not accelerator.is_fp16_supported():
        name = accelerator.device_name()
        raise UserError(f"precision=fp16: DeepSpeed does not support it on this device ({name}); take bf16 or fp32")
    check_optimizer(config.optim, stage_of(settings))
    if offloads(settings) and not optimizer_class(config.optim).offloads:
        raise UserError(
            f"{config.deepspeed} offloads the optimiser's state, which optim.optimizer={config.optim.optimizer} has no "
            "form for: take adamw"
        )
    micro = config.data.batch_size // (world_size * config.optim.accumulation)
    return {
        **settings,
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": config.optim.accumulation,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**12,
    }


def build_engine(
    model: VideoLanguageModel,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    steps: int,
    *,
    universal: bool = False,
) -> Any:
    """Wraps the model, with its optimiser and schedule over `steps`.

    With `universal`, the engine will load a checkpoint in the universal form (train/checkpoint.py).
    """
    settings = deepspeed_settings(config, ranks.world_size)
    if universal:
        settings["checkpoint"] = {**settings.get("checkpoint", {}), "load_universal": True}
    _check_regularisers(model, stage_of(settings))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if config.precision == "clip_fp16":
        model.backbone.keep_matrices_in_half()
        _reduce_fp16_anywhere()
    checked = config.precision in ("fp32", "clip_fp16") and stage_of(settings) == 0
    offload, fused = offloads(settings), device.type == "cuda"
    optimizer = build_optimizer(model, config.optim, offload=offload, fused=fused, checked=checked)
    schedule = build_schedule(optimizer, config.optim, steps)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings, dist_init_required=False
    )
    take_norms_at_once(engine.optimizer)
    # DeepSpeed broadcasts parameters, not buffers
    ranks.broadcast_(engine.module.buffers())
    return engine


def _reduce_fp16_anywhere() -> None:
    """On CPUs without instructions for fp16, DeepSpeed refuses to reduce such gradients; it reduces them in fp32."""
    accelerator = deepspeed.accelerator.get_accelerator()
    reduced = accelerator.supported_dtypes()
    if torch.float16 not in reduced:
        accelerator.supported_dtypes = lambda: [*reduced, torch.float16]


def offloads(settings: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed file lets the CPU hold the optimiser's state."""
    zero = settings.get("zero_optimization", {})
    return bool(zero.get("offload_optimizer", {}).get("device", "none") != "none")


def _check_regularisers(model: nn.Module, stage: int) -> None:
    """Raises UserError: one has parameters, which ZeRO-3 gathers only during forward passes."""
    for name, module in model.named_modules():
        if stage == 3 and isinstance(module, Regulariser) and next(module.parameters(), None) is not None:
            raise UserError(
                f"{name} ({module.label}) has parameters, which ZeRO-3 does not gather for it: take ZeRO 0, 1 or 2"
            )


def weights(engine: Any, ranks: Ranks) -> dict[str, torch.Tensor]:
    """The whole model's state on rank 0's CPU (elsewhere empty); called by all ranks.

    Under ZeRO-3 one parameter at a time is gathered, so no rank holds more than that besides the result.
    """
    state = (
        {name: buffer.detach().cpu().clone() for name, buffer in engine.module.state_dict().items()}
        if ranks.first
        else {}
    )
    if engine.zero_optimization_stage() < 3:
        return state
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):  # tied weights under each name
        with deepspeed.zero.GatheredParameters([parameter]):
            if ranks.first:
                state[name] = parameter.detach().cpu().clone()
    return state
