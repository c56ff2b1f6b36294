"""Compares the GPU's results with the CPU's, in fp32 without TF32: features, EMCL, losses, gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.batch import Batch
from emcl.doctor.checks import Check
from emcl.doctor.trainers import ALL_TASKS, Bench, batches_of, settings
from emcl.multitask import VideoLanguageModel, collators, total_loss
from emcl.train.arithmetic import set_arithmetic
from emcl.train.initialization import open_splits

TOLERANCE = 1e-4
"""Relative to a tensor's largest number, or to a gradient's norm."""
MODELS: dict[str, tuple[str, ...]] = {
    "sample model": (),
    "ViT-B-32": ("model.name=ViT-B-32", "data.image_size=224", "data.frames=4", "emcl.bases=8"),
}
"""ViT-B-32 has few bases, and weights that `_well_posed` changes."""
NO_CHANCE = ("tasks.captioning.dropout=0", "tasks.msrvtt_qa.dropout=0")
"""Dropout draws different numbers on each kind of device."""


@dataclass(frozen=True)
class Pass:
    """The results of a forward and backward pass, on the CPU."""

    features: Tensor
    similarity: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def exactness(bench: Bench) -> Iterator[Check]:
    """Compares the bench's device with the CPU, for both variants of EMCL and all tasks at once."""
    if not bench.on_gpu:
        yield Check("GPU beside CPU", "no GPU here")
        return
    for model, overrides in MODELS.items():
        for variant in ("reference", "compact"):
            config = settings(bench, *NO_CHANCE, f"emcl.variant={variant}", *overrides, tasks=ALL_TASKS)
            yield from compare(bench, config, f"{model}, EMCL {variant}", torch.device("cpu"), bench.device)


def compare(bench: Bench, config: Config, name: str, one: torch.device, other: torch.device) -> Iterator[Check]:
    """The same model and batch on two devices."""
    set_arithmetic(config)
    config, training, _ = open_splits(config)
    torch.manual_seed(0)
    model = VideoLanguageModel(config).train()
    _well_posed(model)
    (batch,) = next(batches_of(training, config, 1, collators(config, training, training=True)))
    passes = [_pass(copy.deepcopy(model), batch, device) for device in (one, other)]
    for quantity in ("features", "similarity", "loss"):
        yield _check(f"{name}: {quantity}", _difference(*(getattr(outcome, quantity) for outcome in passes)))
    yield _check(f"{name}: gradients", _gradient_difference(passes[0].gradients, passes[1].gradients))


@torch.no_grad()
def _well_posed(model: VideoLanguageModel) -> None:
    """Makes the gradient insensitive to rounding, so that differences come from the devices and not from the model.

    With random weights, ViT-B-32 hardly separates videos, and many of EMCL's bases fit rounding errors only: the
    gradient changes by 2e-3 as weights change by half of their last bit, on one CPU. With the matrices of its blocks
    doubled it changes by 6e-6; but by 6e-3 again where a ReLU's input is within rounding of 0.
    """
    blocks: Any = getattr(model.backbone.image.trunk, "transformer", None)
    for weight in blocks.parameters() if blocks is not None else ():
        if weight.ndim == 2:
            weight.mul_(2)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())


def _pass(model: VideoLanguageModel, batch: Batch, device: torch.device) -> Pass:
    model.to(device)
    moved = batch.to(device)
    with torch.no_grad():
        encoded = model.encode(moved)
        video = encoded.frames_BTD
        text = model.backbone.encode_text(moved.tasks["retrieval"].text)
        retrieval: Any = copy.deepcopy(model.heads["retrieval"])  # EMCL's state is updated in training
        similarity = retrieval.similarity(text, video, encoded.video_mask_BT, model.ranks, retrieval.emcl)
    loss = total_loss(model(batch=moved))
    loss.backward()
    gradients = {name: weight.grad.cpu() for name, weight in model.named_parameters() if weight.grad is not None}
    return Pass(video.cpu(), similarity.cpu(), loss.detach().cpu(), gradients)


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / one.abs().max().clamp_min(1e-12))


def _gradient_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest of any weight's, relative to its gradient's norm, or to 1e-3 of the total norm if that is larger."""
    sizes = {name: gradient.norm() for name, gradient in one.items()}
    least = 1e-3 * torch.stack(list(sizes.values())).norm()
    return max(float((one[name] - other[name]).norm() / torch.maximum(size, least)) for name, size in sizes.items())


def _check(name: str, difference: float) -> Check:
    return Check(name, f"{difference:.1e}", f"<= {TOLERANCE:.0e}", difference <= TOLERANCE)
