"""Where inference runs: devices and precision, as accelerate sees the machine."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils import is_bf16_available
from torch import nn

from emcl.errors import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Devices:
    """The devices that share the work, and the precision of their matrix products."""

    all: Sequence[torch.device]
    dtype: torch.dtype

    @property
    def first(self) -> torch.device:
        return self.all[0]

    def replicas(self, model: Module) -> list[Module]:
        """The model on each device; copies beyond the first."""
        others = [copy.deepcopy(model).to(device) for device in self.all[1:]]
        return [model.to(self.first), *others]


def choose_devices(
    device: str | torch.device | None = None, precision: str | None = None, *, trained: str = "fp32"
) -> Devices:
    """The given device and precision, or the best ones here.

    Args:
        device: one device; all accelerators where not given, the CPU where there is none (or DS_ACCELERATOR=cpu).
        precision: `fp32`, `bf16` or `fp16`; where not given, fp32 on a CPU and elsewhere what the model was trained in.
        trained: the precision that the model was trained in.

    Raises:
        UserError: an unknown precision, or a device that is not here.
    """
    devices = [_device(device)] if device is not None else _all_devices()
    on_cpu = devices[0].type == "cpu"
    if precision is None:
        trained = trained.removeprefix("clip_")  # autocast keeps norms and softmax in fp32, as that training does
        precision = "fp32" if on_cpu or (trained == "bf16" and not is_bf16_available()) else trained
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r} is none of {', '.join(DTYPES)}")
    if precision == "fp16" and on_cpu:
        raise UserError("precision fp16 wants a GPU: take bf16 or fp32")
    return Devices(devices, DTYPES[precision])


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known here (cpu, cuda, cuda:1, ...)") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: there is no GPU here")
    return device


def _all_devices() -> list[torch.device]:
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or os.environ.get("DS_ACCELERATOR") == "cpu":
        return [torch.device("cpu")]
    return [torch.device(kind.type, number) for number in range(torch.accelerator.device_count())]
