"""An architecture's limits on the settings, from its JSON file; without PyTorch, so that errors come at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from emcl.config import Config
from emcl.errors import UserError, first_line
from emcl.model.model_settings import MAX_FRAMES
from emcl.resources import find_architecture

CONTEXT = 77
"""Text positions where an architecture states none: open_clip's default."""
SIDE = 224
"""Image side in pixels where it states none."""


def check_limits(config: Config) -> None:
    """Checks that the model supports the configured frames, bases, tokens and image size.

    Raises:
        UserError: no such architecture; more frames, tokens or bases than it supports; another size.
    """
    if config.model.temporal == "transformer" and config.data.frames > MAX_FRAMES:
        raise UserError(
            f"data.frames={config.data.frames} is not a whole number from 1 to {MAX_FRAMES}, the positions of the "
            "temporal transformer (model.temporal=mean has no such limit)"
        )
    path = find_architecture(config.model.name) if config.model.backbone == "open_clip" else None
    if path is None:
        return
    architecture = _read(path)
    width = architecture["embed_dim"]
    if config.emcl.enabled and config.model.regulariser == "emcl" and config.emcl.bases > width:
        raise UserError(
            f"emcl.bases={config.emcl.bases} is not a whole number from 1 to {width}, the width of {path.stem}"
        )
    side = _side(architecture["vision_cfg"])
    if side is not None and config.data.image_size != side:
        raise UserError(
            f"data.image_size={config.data.image_size} is not {side}, the pixels that {path.stem}'s image tower takes"
        )
    positions = _positions(architecture["text_cfg"])
    if positions is not None and config.data.max_tokens > positions:
        raise UserError(
            f"data.max_tokens={config.data.max_tokens} is not a whole number from 2 to {positions}, the positions of "
            f"{path.stem}'s text tower"
        )


def _read(path: Path) -> dict[str, Any]:
    try:
        architecture: dict[str, Any] = json.loads(path.read_text())
        width, image, text = (architecture[key] for key in ("embed_dim", "vision_cfg", "text_cfg"))
        positions = text.get("context_length", CONTEXT)
        if isinstance(image, dict) and all(type(number) is int and number > 0 for number in (width, positions)):
            return architecture
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no architecture in open_clip's format: {first_line(error)}") from None
    raise UserError(
        f"{path} is no architecture in open_clip's format: embed_dim or context_length is no number above 0, or "
        "vision_cfg no table"
    )


def _side(image: dict[str, Any]) -> int | None:
    """The only size that a tower with positions supports; None for timm's other towers, which support several."""
    side, of_timm = image.get("image_size", SIDE), str(image.get("timm_model_name", ""))
    return side if isinstance(side, int) and (not of_timm or of_timm.startswith("vit_")) else None


def _positions(text: dict[str, Any]) -> int | None:
    """Most tokens of a text; for a Hugging Face model from its own file, None if that is not on this disk."""
    name = text.get("hf_model_name")
    if not name:
        return int(text.get("context_length", CONTEXT))
    try:
        return int(json.loads((Path(name) / "config.json").read_text())["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
