"""The shared backbone: frames and sentences to embeddings of one width. Every task works from one encoding.

A kind of backbone provides two towers and their tokenizer (`Backbone.build_towers`, `Backbone.tokenizer`); the temporal
encoder, freezing, recomputation and cached features are the same for all. Kinds are listed in `emcl.components`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from emcl.components import BACKBONES
from emcl.config import Config
from emcl.data.batch import VideoFrames
from emcl.data.captions import Tokenizer
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.batch_norm import keep_statistics_in_full_precision
from emcl.model.model_settings import ModelConfig
from emcl.model.temporal import TemporalTransformer
from emcl.model.tower import Preprocessing, Tower, Towers

TOWERS = ("image", "text")
_TOKENIZERS_KEPT = 4


@dataclass
class Encoded:
    """One global micro-batch's videos on this rank, encoded once for all tasks."""

    frames_BTD: Tensor
    video_mask_BT: Tensor
    video_B: Tensor | None = None
    """Which video each is: in training, those of one number are not negatives of each other (`Batch.video_B`)."""
    outputs_BW: Tensor | None = None
    """What `Backbone.encode_video_with_outputs` gives besides, where it was asked for."""
    _of_all_ranks: Tensor | None = field(default=None, init=False, repr=False)

    def videos_of_all_ranks(self, ranks: Ranks) -> Tensor | None:
        """`video_B` of all ranks' videos, in rank order. Called by all ranks; only the first call of a batch
        communicates."""
        if self._of_all_ranks is None and self.video_B is not None:
            self._of_all_ranks = ranks.gather_rows(self.video_B)
        return self._of_all_ranks


class Backbone(nn.Module):
    """Base class: two towers and the temporal encoder.

    `encode_...` go through modules' forward passes only, as ZeRO-3 needs.

    Args:
        max_tokens: tokens of a text, start and end counted.
        load_weights: whether pretrained ones are read; otherwise the caller loads them.
    """

    config_class: ClassVar[type | None] = None
    """A frozen dataclass of the kind's own settings, `model.backbone_options`."""

    def __init__(self, config: ModelConfig, *, max_tokens: int, load_weights: bool = True) -> None:
        super().__init__()
        self.config, self.max_tokens = config, max_tokens
        towers = self.build_towers(config, max_tokens=max_tokens, load_weights=load_weights)
        self.image, self.text = towers.image, towers.text
        keep_statistics_in_full_precision(self)
        self.embed_dim, self.initial_logit_scale = towers.embed_dim, towers.logit_scale
        self.initial_logit_bias = towers.logit_bias
        self.temporal: TemporalTransformer | None = None
        if config.temporal == "transformer":
            self.temporal = TemporalTransformer(
                towers.embed_dim,
                config.temporal_layers,
                towers.text.trunk if config.blocks_start() == "text" else None,
                projection=config.temporal_projection,
            )
        # numbers and not buffers: a cast of the model to bf16 would round them
        colours = zip(config.mean or towers.mean, config.std or towers.std, strict=True)
        self.normalisation = [(255 * mean, 255 * std) for mean, std in colours]
        self.recomputed = _checkpoint_blocks(self) if config.activation_checkpointing else []
        self.frozen_towers = [name for name in TOWERS if name in config.frozen]
        self.half_matrices = False
        _freeze(self, config.frozen)
        if config.head_dropout:
            _drop_out(self, config.head_dropout)

    # --- what a kind of backbone defines

    @classmethod
    def build_towers(cls, config: ModelConfig, *, max_tokens: int, load_weights: bool) -> Towers:
        """Raises UserError: no such model, a missing file, or weights of another architecture."""
        raise NotImplementedError

    @classmethod
    def tokenizer(cls, config: ModelConfig, max_tokens: int) -> Tokenizer:
        """For texts of up to `max_tokens` tokens, made without the model; loader processes get it with their split.

        Raises:
            UserError: its files are missing, or it does not support so many tokens.
        """
        raise NotImplementedError

    @classmethod
    def completed(cls, config: ModelConfig) -> ModelConfig:
        """`config` completed by what only the pretrained weights tell (open_clip: the activation that they were trained
        with). It is stored with a run, so that its exports can be rebuilt without those files."""
        return config

    @classmethod
    def preprocessing(cls, config: ModelConfig) -> Preprocessing | None:
        """How the pretrained weights want frames; None where they do not say. A run keeps it with its settings."""
        return None

    @classmethod
    def missing_weights(cls, config: ModelConfig) -> list[str]:
        """A line for each missing file."""
        return []

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises UserError, before the work: settings that its models do not support, such as `data.image_size`."""
        if config.precision == "clip_fp16":
            raise UserError(only_for_clip(f"model.backbone={config.model.backbone}"))

    def keep_matrices_in_half(self) -> None:
        """Casts the towers' matrices to fp16 and sets `half_matrices`: `precision=clip_fp16`. Norms and embeddings stay
        in fp32, and what the towers return is cast to it.

        Raises:
            UserError: they cannot be trained so.
        """
        raise UserError(only_for_clip(f"model.backbone={self.config.backbone}"))

    @classmethod
    def architecture(cls, config: ModelConfig) -> Mapping[str, Any]:
        """Describes the towers beside their weights, as JSON: cached features belong to both."""
        return {"backbone": config.backbone, "options": dict(config.backbone_options), "name": config.name}

    @classmethod
    def options(cls, config: ModelConfig) -> Any:
        """The kind's own settings, an instance of `config_class`."""
        return BACKBONES.options(config.backbone, config.backbone_options)

    # --- what is the same for all

    def train(self, mode: bool = True) -> Backbone:
        """A frozen trunk stays in evaluation mode: its norms' statistics and dropout are frozen too."""
        super().train(mode)
        for name in self.frozen_towers:
            getattr(self, name).trunk.eval()
        return self

    def encode_video(self, videos: VideoFrames) -> Tensor:
        """Frame embeddings in temporal order, each conditioned on the other frames of its video: (B, T, D)."""
        return self._in_order(self._encode(self.image, self._pictures(videos.frames)), videos)

    def encode_video_with_outputs(self, videos: VideoFrames) -> tuple[Tensor, Tensor]:
        """As `encode_video`; and the mean over each video's frames of what the image trunk puts out, before the head:
        (B, W) in fp32, zeros for a video without a frame. For evaluation."""
        outputs_NW = self._trunk(self.image, self._pictures(videos.frames))
        own_NW = outputs_NW[: len(videos.frames)].float()
        video_N = videos.slots // videos.mask_BT.shape[1]
        total_BW = own_NW.new_zeros(len(videos.mask_BT), own_NW.shape[1]).index_add(0, video_N, own_NW)
        mean_BW = total_BW / videos.mask_BT.sum(1, keepdim=True).clamp_min(1)
        return self._in_order(self._encode(self.image, outputs_NW), videos), mean_BW

    def encode_frames(self, frames: Tensor) -> Tensor:
        """Single frames, uint8 (n, H, W, 3) or outputs of the trunk (n, W) -> (n, D)."""
        return self._encode(self.image, frames if frames.ndim == 2 else self.preprocess(frames))

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids (B, L), or outputs of the trunk (B, W) -> (B, D)."""
        return self._encode(self.text, text)

    def text_outputs(self, text: Tensor) -> Tensor:
        """What the text trunk puts out, before the head: (B, W), which `encode_text` takes. For evaluation."""
        return self._trunk(self.text, text)

    def _pictures(self, frames: Tensor) -> Tensor:
        """What the image tower gets for frames; with `absent_frames=grey` one picture more, which stands for them.

        That one is 0 once it is normalised, and in the pass also where no frame is absent: no rank waits to know that.
        """
        if frames.ndim == 2:
            return frames
        if self.config.absent_frames != "grey":
            return self.preprocess(frames)
        pictures = self.preprocess(torch.cat([frames, frames[:1]]))
        pictures[-1] = 0
        return pictures

    def _in_order(self, features_ND: Tensor, videos: VideoFrames) -> Tensor:
        """Features of `_pictures` to (B, T, D), each frame conditioned on the others."""
        mask_BT, present = videos.mask_BT, len(videos.frames)
        flat = features_ND.new_zeros((mask_BT.numel(), features_ND.shape[-1]))
        frames_BTD = flat.index_copy(0, videos.slots, features_ND[:present]).view(*mask_BT.shape, -1)
        if len(features_ND) > present:
            frames_BTD = torch.where(mask_BT[..., None], frames_BTD, features_ND[present])
        return frames_BTD if self.temporal is None else self.temporal(frames_BTD, mask_BT)

    def encode_tokens(self, ids: Tensor, *, projected: bool = False) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) -> each token in context (B, L, text.token_width), and the token mask (B, L).

        With `projected`, after the text tower's last projection: (B, L, D).
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and "text" not in self.frozen_towers):
            tokens, mask = self.text.tokens(ids)
        return self._in_full(self.text.projected(tokens) if projected else tokens), mask

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 (n, H, W, 3) -> normalised (n, 3, H, W) in the image tower's precision."""
        channels = [(frames[..., c].float() - mean) / std for c, (mean, std) in enumerate(self.normalisation)]
        return torch.stack(channels, 1).to(torch.float16 if self.half_matrices else _dtype(self.image))

    def tokenize(self, texts: list[str]) -> Tensor:
        """(n, L) token ids on the text tower's device."""
        ids = _kept_tokenizer(type(self), self.config, self.max_tokens)(texts)
        return ids.to(next(self.text.parameters()).device)

    def _encode(self, tower: Tower, inputs: Tensor) -> Tensor:
        """Of a tower's inputs, or of its trunk's outputs."""
        if _are_outputs(inputs):
            return self._in_full(tower.project(inputs.to(_dtype(tower))))
        if tower in self.recomputed and self.training and torch.is_grad_enabled():
            return self._in_full(checkpoint(tower, inputs, use_reentrant=False))
        return self._in_full(tower(inputs))

    def _trunk(self, tower: Tower, inputs: Tensor) -> Tensor:
        return inputs if _are_outputs(inputs) else tower.trunk(inputs)

    def _in_full(self, outputs: Tensor) -> Tensor:
        return outputs.float() if self.half_matrices else outputs


def only_for_clip(setting: str) -> str:
    """The refusal of a model that cannot be trained in `clip_fp16`."""
    return f"precision=clip_fp16 is for CLIPs of OpenAI's layout, which {setting} is not: take fp32, bf16 or fp16"


def backbone_class(config: ModelConfig) -> type[Backbone]:
    """The configured kind of backbone.

    Raises:
        UserError: no such kind.
    """
    kind: type[Backbone] = BACKBONES.load_class(config.backbone, Backbone)
    return kind


def build_backbone(config: Config, *, load_weights: bool = True) -> Backbone:
    """Raises UserError as the kind's `build_towers` does, or for a frozen part that does not exist."""
    return backbone_class(config.model)(config.model, max_tokens=config.data.max_tokens, load_weights=load_weights)


def tokenizer_of(config: Config) -> Tokenizer:
    """The configured backbone's tokenizer; cached, so that it is not made anew for every evaluation.

    Raises:
        UserError: as its kind's `tokenizer`.
    """
    return _kept_tokenizer(backbone_class(config.model), config.model, config.data.max_tokens)


_tokenizers: dict[tuple[str, int], Tokenizer] = {}


def _kept_tokenizer(kind: type[Backbone], config: ModelConfig, max_tokens: int) -> Tokenizer:
    """Reading a vocabulary takes a tenth of a second, and collators are made anew for every evaluation."""
    key = repr(config), max_tokens
    if key not in _tokenizers:
        while len(_tokenizers) >= _TOKENIZERS_KEPT:
            del _tokenizers[next(iter(_tokenizers))]
        _tokenizers[key] = kind.tokenizer(config, max_tokens)
    return _tokenizers[key]


def _are_outputs(inputs: Tensor) -> bool:
    """Whether they are rows of a trunk's outputs, and neither pictures nor token ids."""
    return inputs.ndim == 2 and inputs.is_floating_point()


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _checkpoint_blocks(backbone: Backbone) -> list[nn.Module]:
    """Turns on activation checkpointing by block; returns the towers that lack it, to be recomputed as a whole."""
    towers = [getattr(backbone, name) for name in TOWERS]
    for tower in towers:
        if hasattr(tower.trunk, "set_grad_checkpointing"):
            tower.trunk.set_grad_checkpointing(True)
    return [tower for tower in towers if not hasattr(tower.trunk, "set_grad_checkpointing")]


def _drop_out(backbone: Backbone, share: float) -> None:
    """Before the heads of the towers that have one; those that end with their projection have none."""
    towers: list[Tower] = [getattr(backbone, name) for name in TOWERS]
    with_head = [tower for tower in towers if not isinstance(tower.head, nn.Identity)]
    if not with_head:
        raise UserError(
            f"model.head_dropout={share}: the towers of {backbone.config.name} have no heads of their own; leave it out"
        )
    for tower in with_head:
        tower.dropout.p = share


def _freeze(backbone: Backbone, frozen: list[str]) -> None:
    """Stops the gradients of whole trunks (`image`, `text`) and of parameters whose name starts with an entry."""
    for entry in frozen:
        prefix = f"{entry}.trunk." if entry in TOWERS else entry
        parameters = [parameter for name, parameter in backbone.named_parameters() if name.startswith(prefix)]
        if not parameters:
            raise UserError(f"model.frozen: {entry!r} is neither image, text nor the start of a parameter's name")
        for parameter in parameters:
            parameter.requires_grad_(False)
