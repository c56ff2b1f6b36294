"""FLOP of a training step, counted from the configuration, and a GPU's peak FLOP/s: for MFU.

MFU is the model's FLOP/s over the device's peak (Chowdhery et al., PaLM, 2022, appendix B): a forward pass, and twice
that for the backward pass of trained weights; recomputation to save memory does not count. The towers and the temporal
transformer are counted, which are nearly all of a step; heads and the similarity are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from emcl.components import BACKBONES
from emcl.config import Config
from emcl.model.backbone import build_backbone
from emcl.train.one_sample import for_one_sample

PEAKS = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "A10": 125e12,
    "V100": 125e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "T4": 65e12,
}  # fmt: skip
"""Dense bf16 (V100, T4: fp16) FLOP/s by NVIDIA's data sheets; the first key that a device's name contains counts."""


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The device's peak in this precision; None for one that is not in the table, and for fp32, whose peak depends on
    TF32."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


@dataclass(frozen=True)
class Flops:
    """FLOP of one video and of one sentence in a training step."""

    video: float
    text: float
    frames: int
    """Frames of a video."""

    @staticmethod
    def of(config: Config) -> Flops:
        """Counted on the meta device: nothing is computed."""
        with torch.device("meta"):
            backbone = build_backbone(config, load_weights=False).eval()
        videos, text = for_one_sample(backbone, config)
        counts = []
        for tower, call in (
            ("image", lambda: backbone.encode_video(videos)),
            ("text", lambda: backbone.encode_text(text)),
        ):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            frozen = tower in backbone.frozen_towers and not config.model.cache_features
            counts.append(float(counter.get_total_flops() * (1 if frozen else 3)))
        return Flops(counts[0], counts[1], config.data.frames)

    def of_step(self, frames: int, texts: int) -> float:
        """FLOP of a step on so many frames and sentences."""
        return self.video * frames / self.frames + self.text * texts


def flops_where_known(config: Config) -> Flops | None:
    """None for another package's backbone that does not run on the meta device, as one that reads tensor values."""
    try:
        return Flops.of(config)
    except (RuntimeError, ValueError):
        if config.model.backbone in BACKBONES.built_in:
            raise
        return None
