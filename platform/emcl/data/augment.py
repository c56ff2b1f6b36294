"""Training augmentation of a clip: one draw, applied to every frame alike."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
from PIL import Image

from emcl.data.decode import Frames
from emcl.errors import UserError

Augment = Callable[[Frames, int], Frames]
"""(frames, seed) -> frames"""


def augmentation(name: str) -> Augment | None:
    """timm's RandAugment by its string (`rand-m7-n4-mstd0.5-inc1`), or None for `none`."""
    if name == "none":
        return None
    from timm.data.auto_augment import rand_augment_transform

    try:
        transform = rand_augment_transform(name, {"translate_const": 100})
    except Exception as error:
        raise UserError(f"data.augment={name} is neither `none` nor a timm RandAugment string: {error}") from None

    def apply(frames: Frames, seed: int) -> Frames:
        out = []
        for frame in frames:
            # timm draws from the global generators; the same seed for each frame keeps the clip steady
            random.seed(seed)
            np.random.seed(seed % 2**32)
            out.append(np.asarray(transform(Image.fromarray(frame))))
        return np.stack(out)

    return apply
