"""From a decoded frame to the square that an image tower takes: by FFmpeg, or by PIL as torchvision's transforms do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from emcl.data.data_settings import DataConfig
from emcl.data.rand_augment import rand_augment, seeded

Frames = NDArray[np.uint8]
"""(time, height, width, 3), RGB."""
Shape = Callable[[av.VideoFrame], NDArray[np.uint8]]
"""A frame of any size to (size, size, 3)."""


class _Scaling:
    def __getstate__(self) -> dict[str, Any]:
        """Without what is made once it is needed, which no other process can be given."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    @cached_property
    def _scaler(self) -> VideoReformatter:
        """FFmpeg's, shared by all frames: creating one costs more than using it. (More threads than one are slower.)"""
        return VideoReformatter()


@dataclass(frozen=True)
class ByFFmpeg(_Scaling):
    """The short side resized and the centre cropped, or both sides resized (`squash`)."""

    size: int
    mode: str = "shortest"
    interpolation: str = "bicubic"

    def __call__(self, frame: av.VideoFrame) -> NDArray[np.uint8]:
        width = height = self.size
        if self.mode == "shortest":
            scale = self.size / min(frame.width, frame.height)
            width, height = (max(self.size, round(side * scale)) for side in (frame.width, frame.height))
        how: dict[str, Any] = {"interpolation": Interpolation[self.interpolation.upper()], "threads": 1}
        image: Any = self._scaler.reformat(frame, width, height, format="rgb24", **how).to_ndarray()
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return image[top : top + self.size, left : left + self.size]


@dataclass(frozen=True)
class ByPIL(_Scaling):
    """As `ByFFmpeg`, antialiased, pixel for pixel as torchvision's transforms.

    `augment` is `none` or a timm RandAugment string, which then changes the frame while it is whole.
    """

    size: int
    mode: str = "shortest"
    interpolation: str = "bicubic"
    augment: str = "none"

    def __call__(self, frame: av.VideoFrame, seed: int | None = None) -> NDArray[np.uint8]:
        """Frames with the same `seed` are augmented alike; without one, none is."""
        # not by `to_image`: its threads may be those of a process that has been forked, and never answer
        image = Image.fromarray(self._scaler.reformat(frame, format="rgb24", threads=1).to_ndarray())
        if self.augment != "none" and seed is not None:
            with seeded(seed):
                image = self._rand_augment(image)
        return np.asarray(self._square(image))

    @cached_property
    def _rand_augment(self) -> Any:
        return rand_augment(self.augment)

    def _square(self, image: Image.Image) -> Image.Image:
        how = Image.Resampling[self.interpolation.upper()]
        if self.mode == "squash":
            return image.resize((self.size, self.size), how)
        short = min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        left, top = (round((side - self.size) / 2) for side in (width, height))
        return image.resize((width, height), how).crop((left, top, left + self.size, top + self.size))


def evaluated_shape(data: DataConfig) -> ByFFmpeg | ByPIL:
    """By a run's settings, without augmentation. Not for several threads: its scaler is used again."""
    kind = {"ffmpeg": ByFFmpeg, "pil": ByPIL}[data.resize]
    return kind(data.image_size, data.resize_mode or "shortest", data.interpolation or "bicubic")
