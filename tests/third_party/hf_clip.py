"""A backbone of somebody else's: a CLIP of transformers, `model.name` being its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD, SimpleTokenizer
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from emcl.config import Config
from emcl.data.captions import Tokenizer
from emcl.errors import UserError
from emcl.model.backbone import Backbone
from emcl.model.model_settings import ModelConfig
from emcl.model.tower import TextTower, Tower, Towers

PADDING = 0


@dataclass(frozen=True)
class HfClipConfig:
    """Settings of its own."""

    attention: str = "sdpa"
    """An implementation of transformers'."""


class ImageTrunk(nn.Module):
    def __init__(self, vision: nn.Module) -> None:
        super().__init__()
        self.vision = vision

    def forward(self, pixels: Tensor) -> Tensor:
        return self.vision(pixel_values=pixels).pooler_output


class TextTrunk(nn.Module):
    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor) -> Tensor:
        return self.text(input_ids=ids).pooler_output  # causal: what is padded comes after all that is looked at


class HfTextTower(TextTower):
    def tokens(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.trunk.text(input_ids=ids).last_hidden_state, ids != PADDING


class HfClip(Backbone):
    config_class = HfClipConfig

    @classmethod
    def build_towers(cls, config: ModelConfig, *, max_tokens: int, load_weights: bool) -> Towers:
        attention = cls.options(config).attention
        if load_weights and config.pretrained:
            clip = CLIPModel.from_pretrained(config.pretrained, attn_implementation=attention)
        else:
            shape = cls.shape(config)
            shape._attn_implementation = attention
            clip = CLIPModel(shape)
        vision, text = clip.config.vision_config.hidden_size, clip.config.text_config.hidden_size
        return Towers(
            image=Tower(ImageTrunk(clip.vision_model), clip.visual_projection, vision),
            text=HfTextTower(TextTrunk(clip.text_model), clip.text_projection, text, text, PADDING),
            embed_dim=clip.config.projection_dim,
            logit_scale=clip.config.logit_scale_init_value if clip.logit_scale.is_meta else clip.logit_scale.item(),
            mean=OPENAI_DATASET_MEAN,
            std=OPENAI_DATASET_STD,
        )

    @classmethod
    def tokenizer(cls, config: ModelConfig, max_tokens: int) -> Tokenizer:
        return SimpleTokenizer(context_length=max_tokens)

    @classmethod
    def check(cls, config: Config) -> None:
        shape = cls.shape(config.model)
        if config.data.image_size != shape.vision_config.image_size:
            raise UserError(
                f"data.image_size={config.data.image_size} is not the {shape.vision_config.image_size} of the model"
            )
        if config.data.max_tokens > shape.text_config.max_position_embeddings:
            raise UserError(f"data.max_tokens={config.data.max_tokens} is more than the model's positions")

    @classmethod
    def shape(cls, config: ModelConfig) -> CLIPConfig:
        if not Path(config.name).is_dir():
            raise UserError(f"model.name={config.name}: no such folder of a CLIP of transformers")
        return CLIPConfig.from_pretrained(config.name)

    @classmethod
    def missing_weights(cls, config: ModelConfig) -> list[str]:
        gone = config.pretrained and not Path(config.pretrained).is_dir()
        return [f"model.pretrained={config.pretrained}: no such folder"] if gone else []
