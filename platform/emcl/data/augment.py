"""RandAugment for clips: timm draws the operations in the loader; the training device applies them.

Each clip gets one draw, used for all its frames. timm's own objects make it from the clip's seed; their image
operations are replaced by functions that only record what they would have done. A batch carries the records of all its
clips as a plan, grouped by operation. `image_ops.augmented` applies it without reading any value back from the device.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emcl.data.rand_augment import rand_augment, seeded
from emcl.errors import UserError

Plan = dict[str, Any]
"""`operations`, a list of `Operation` in order, and `numbers`, one float64 tensor with all their parameters: a separate
tensor for each would cost one more copy to the device, and one more file shared by a loader process."""
Array = NDArray[Any]

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x_rel", "translate_y_rel")
TABLES = ("invert", "posterize", "solarize", "solarize_add", "brightness")
"""Operations that map each pixel value to another one, independent of the image."""
BLENDS = ("contrast", "color", "sharpness")
"""Operations that blend the image with an image computed from it, by a factor."""
WHOLE = ("auto_contrast", "equalize")
"""Operations without an argument, computed from the image's histogram."""
BLUR = "gaussian_blur"
BICUBIC = 3
"""PIL's number for bicubic resampling."""


@dataclass(frozen=True)
class Slice:
    """Where an array is stored in a plan's numbers, with its shape and type."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, numbers: Tensor) -> Tensor:
        return numbers[self.start : self.start + math.prod(self.shape)].view(self.shape).to(self.dtype)


@dataclass(frozen=True)
class Operation:
    """One kind of operation, applied to frames of several clips."""

    kind: str
    arrays: dict[str, Slice]
    """`frames`, the frames' indices in the batch, and the parameters for each frame (for `affine`: for each clip)."""


@dataclass(frozen=True)
class Drawn:
    """One operation of a clip's draw."""

    kind: str
    """timm's name of the function."""
    argument: float = 0.0
    cubic: bool = False
    """For geometric operations: bicubic resampling, otherwise bilinear."""


class Augmentation:
    """timm's RandAugment, configured by its string (`rand-m7-n4-mstd0.5-inc1`).

    Raises:
        UserError: timm does not accept the string.
    """

    def __init__(self, name: str) -> None:
        self._transform = rand_augment(name)
        for op in self._transform.ops:
            kind = "color" if op.aug_fn.__name__ == "desaturate" else op.aug_fn.__name__
            if kind not in (*GEOMETRIC, *TABLES, *BLENDS, *WHOLE, BLUR):
                raise UserError(f"data.augment={name} has the operation {op.name}, which is not known here")
            op.aug_fn = partial(_note, kind, desaturating=op.aug_fn.__name__ == "desaturate")

    def draw(self, seed: int) -> list[Drawn]:
        """What timm would do to an image with `random` and NumPy seeded so; restores both states afterwards."""
        with seeded(seed):
            operations: list[Drawn] = self._transform([])
        return operations

    def plan(self, seeds: Sequence[int], counts: Sequence[int], height: int, width: int) -> Plan:
        """The plan of a batch whose clips have these seeds and frame counts, in the order of the clips."""
        return plan_of([self.draw(seed) for seed in seeds], counts, height, width)


def augmentation(name: str) -> Augmentation | None:
    """Built from the setting `data.augment`; None for `none`."""
    return None if name == "none" else Augmentation(name)


def _note(kind: str, done: list[Drawn], *arguments: float, desaturating: bool, **options: Any) -> list[Drawn]:
    """Replaces timm's image function: appends this operation to `done`, with the same calls to `random`."""
    resample = options["resample"]
    if kind in GEOMETRIC and isinstance(resample, list | tuple):
        resample = random.choice(resample)
    argument = float(arguments[0]) if arguments else 0.0
    if desaturating:
        argument = min(1.0, max(0.0, 1.0 - argument))
    return [*done, Drawn(kind, argument, kind in GEOMETRIC and resample == BICUBIC)]


def plan_of(draws: Sequence[Sequence[Drawn]], counts: Sequence[int], height: int, width: int) -> Plan:
    """The operations of several clips' draws; `counts` are frames per clip, stored clip after clip."""
    ends = np.cumsum(counts)
    frames_of = [range(end - count, end) for end, count in zip(ends.tolist(), counts, strict=True)]
    operations: list[Operation] = []
    numbers: list[Array] = [np.zeros(0)]
    start = 0
    for turn in range(max(map(len, draws), default=0)):
        now = [(draw[turn], frames) for draw, frames in zip(draws, frames_of, strict=True) if len(draw) > turn]
        for kind, arrays in _grouped(now, height, width):
            slices = {}
            for name, (array, dtype) in arrays.items():
                slices[name] = Slice(start, array.shape, dtype)
                numbers.append(array.ravel().astype(np.float64))
                start += array.size
            operations.append(Operation(kind, slices))
    return {"operations": operations, "numbers": torch.from_numpy(np.concatenate(numbers))}


_Group = tuple[str, dict[str, tuple[Array, torch.dtype]]]


def _grouped(now: list[tuple[Drawn, range]], height: int, width: int) -> Iterator[_Group]:
    """One operation per clip, grouped by kind."""
    groups: dict[tuple[Any, ...], list[tuple[Drawn, range]]] = {}
    for op, frames in now:
        key: tuple[Any, ...] = ("table" if op.kind in TABLES else op.kind,)
        if op.kind in GEOMETRIC:  # grouped by number of frames
            key = ("affine", len(frames))
        groups.setdefault(key, []).append((op, frames))
    for (kind, *_), members in groups.items():
        if kind == "affine":
            frame_indices = np.array([list(frames) for _, frames in members])
            matrices = np.array([matrix(op, height, width) for op, _ in members])
            cubic = np.array([op.cubic for op, _ in members])
            yield (
                kind,
                {
                    "frames": (frame_indices, torch.int64),
                    "matrix": (matrices, torch.float64),
                    "cubic": (cubic, torch.bool),
                },
            )
            continue
        each = [op for op, frames in members for _ in frames]
        arrays = {"frames": (np.array([index for _, frames in members for index in frames]), torch.int64)}
        if kind == "table":
            arrays["table"] = (np.stack([_table(op) for op in each]), torch.uint8)
        elif kind in BLENDS:
            arrays["factor"] = (np.array([op.argument for op in each]), torch.float32)
        elif kind == BLUR:
            arrays["weights"] = (np.array([box_weights(op.argument) for op in each]), torch.int64)
        yield kind, arrays


def _table(op: Drawn) -> Array:
    """The output for each of the 256 pixel values."""
    values = np.arange(256)
    if op.kind == "invert":
        values = 255 - values
    elif op.kind == "posterize":
        values &= 256 - (1 << max(0, 8 - int(op.argument)))
    elif op.kind == "solarize":
        values = np.where(values < op.argument, values, 255 - values)
    elif op.kind == "solarize_add":
        values = np.where(values < 128, np.minimum(255, values + int(op.argument)), values)
    else:  # brightness: a blend with black, in single precision as in PIL
        values = np.clip(np.float32(op.argument) * values.astype(np.float32), 0, 255)
    return values.astype(np.uint8)


def matrix(op: Drawn, height: int, width: int) -> list[float]:
    """(a, b, c, d, e, f): the output pixel centred at (x, y) samples the input at (ax + by + c, dx + ey + f)."""
    if op.kind == "rotate":
        angle = -math.radians(op.argument % 360.0)
        cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2  # the fixed point
        return [cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y]
    return {
        "shear_x": [1, op.argument, 0, 0, 1, 0],
        "shear_y": [1, 0, 0, op.argument, 1, 0],
        "translate_x_rel": [1, 0, op.argument * width, 0, 1, 0],
        "translate_y_rel": [1, 0, 0, 0, 1, op.argument * height],
    }[op.kind]


BLUR_REACH = 3
"""Largest extent of a box to each side, in pixels; timm's blurs have radius 2 at most, their boxes 2 and a fraction."""
BLUR_PASSES = 3


def box_weights(radius: float) -> list[int]:
    """Weights, in units of 2^-24, of the box filter whose three passes approximate a Gaussian with sigma = `radius`.

    The box (Gwosdek et al., 2011) has whole pixels to each side and a fraction of one more, so that its variance is one
    third of the Gaussian's.
    """
    one, sigma = np.float32(1), np.float32(radius)  # in single precision, as in PIL
    variance = sigma * sigma / np.float32(BLUR_PASSES)
    whole = math.floor((math.sqrt(12.0 * float(variance) + 1.0) - 1.0) / 2.0)
    next_one = np.float32(whole + 1)
    fraction = np.float32(2 * whole + 1) * (np.float32(whole) * next_one - 3 * variance)
    fraction /= 6 * (variance - next_one * next_one)
    inner = int(np.float32(2**24) / ((whole + fraction) * 2 + one))
    outer = (2**24 - (whole * 2 + 1) * inner) // 2
    reach = range(-BLUR_REACH, BLUR_REACH + 1)
    return [inner if abs(at) <= whole else outer if abs(at) == whole + 1 else 0 for at in reach]
