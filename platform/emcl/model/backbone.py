"""The shared backbone: frames and sentences to embeddings of one width. Every task works from one encoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emcl.errors import UserError
from emcl.model.settings import ModelConfig
from emcl.model.temporal import TemporalTransformer
from emcl.model.towers import build_towers

TOWERS = ("image", "text")


@dataclass
class Encoded:
    """One global micro-batch's videos on this rank, encoded once for all tasks."""

    frames_BTD: Tensor
    video_mask_BT: Tensor


class Backbone(nn.Module):
    """CLIP's towers and the temporal encoder.

    `encode_video` and `encode_text` go through modules' forward passes only, as ZeRO-3 needs.
    """

    def __init__(self, config: ModelConfig, *, words: int | None = None, load_weights: bool = True) -> None:
        super().__init__()
        towers = build_towers(config, words=words, load_weights=load_weights)
        self.image, self.text = towers.image, towers.text
        self.embed_dim, self.initial_logit_scale = towers.embed_dim, towers.logit_scale
        self.temporal: TemporalTransformer | None = None
        if config.temporal == "transformer":
            self.temporal = TemporalTransformer(
                towers.embed_dim, config.temporal_layers, towers.text.trunk if config.pretrained else None
            )
        # numbers and not buffers: a cast of the model to bf16 would round them
        self.normalisation = [(255 * mean, 255 * std) for mean, std in zip(towers.mean, towers.std, strict=True)]
        self.recomputed = _checkpoint_blocks(self) if config.activation_checkpointing else []
        self.frozen_towers = [name for name in TOWERS if name in config.frozen]
        _freeze(self, config.frozen)

    def train(self, mode: bool = True) -> Backbone:
        """A frozen trunk stays in evaluation mode: its norms' statistics and dropout are frozen too."""
        super().train(mode)
        for name in self.frozen_towers:
            getattr(self, name).trunk.eval()
        return self

    def encode_video(self, frames: Tensor, frame_slot: Tensor, mask_BT: Tensor) -> Tensor:
        """All frames of the batch, their slots in (B T), and mask (B, T) -> (B, T, D).

        Frames are uint8 (n, H, W, 3), or (n, W) outputs of the frozen trunk. Short videos are not padded before the
        tower: a batch costs the frames that it holds.
        """
        if frames.ndim == 2:
            features = self.image.head(frames.to(_dtype(self.image)))  # (n, D)
        else:
            features = self._run(self.image, self.pixels(frames))
        flat = features.new_zeros((mask_BT.numel(), features.shape[-1])).index_copy(0, frame_slot, features)
        frames_BTD = flat.view(*mask_BT.shape, -1)
        return frames_BTD if self.temporal is None else self.temporal(frames_BTD, mask_BT)

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids (B, L), or outputs of the frozen trunk (B, W) -> (B, D)."""
        if text.is_floating_point():
            return self.text.head(text.to(_dtype(self.text)))
        return self._run(self.text, text)

    def encode_tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) -> each token in context (B, L, text.token_width), and which there are (B, L)."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text" not in self.frozen_towers):
            return self.text.tokens(ids)

    def pixels(self, frames: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) -> normalised (n, 3, H, W) in the image tower's precision."""
        channels = [(frames[..., c].float() - mean) / std for c, (mean, std) in enumerate(self.normalisation)]
        return torch.stack(channels, 1).to(_dtype(self.image))

    def _run(self, tower: nn.Module, inputs: Tensor) -> Tensor:
        if tower in self.recomputed and self.training and torch.is_grad_enabled():
            return checkpoint(tower, inputs, use_reentrant=False)
        return tower(inputs)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _checkpoint_blocks(backbone: Backbone) -> list[nn.Module]:
    """Lets each tower keep the inputs of its blocks alone; returns those that cannot, to be recomputed whole."""
    towers = [getattr(backbone, name) for name in TOWERS]
    for tower in towers:
        if hasattr(tower.trunk, "set_grad_checkpointing"):
            tower.trunk.set_grad_checkpointing(True)
    return [tower for tower in towers if not hasattr(tower.trunk, "set_grad_checkpointing")]


def _freeze(backbone: Backbone, frozen: list[str]) -> None:
    """Stops the gradients of whole trunks (`image`, `text`) and of parameters whose name starts with an entry."""
    for entry in frozen:
        prefix = f"{entry}.trunk." if entry in TOWERS else entry
        found = [parameter for name, parameter in backbone.named_parameters() if name.startswith(prefix)]
        if not found:
            raise UserError(f"model.frozen: {entry!r} is neither image, text nor the start of a parameter's name")
        for parameter in found:
            parameter.requires_grad_(False)
