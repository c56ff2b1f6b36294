"""RandAugment for clips: timm draws in the loader, and the pixels are changed on the training device.

One draw a clip, the same for all its frames. It follows from the clip's seed by timm's own objects, whose image
operations are replaced by notes of what they would have done. A batch carries the notes of all its clips as a plan,
grouped by operation, which `image_ops.augmented` carries out without looking at a value on the device.
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

from emcl.errors import UserError

Plan = dict[str, Any]
"""`operations`, a list of `Operation` in their order, and `numbers`, one float64 tensor with all that they take: a
tensor of its own for each would cost a copy to the device, and a file that a loader process shares."""
Array = NDArray[Any]

GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x_rel", "translate_y_rel")
TABLES = ("invert", "posterize", "solarize", "solarize_add", "brightness")
"""Operations that give every pixel value another one, whatever the image."""
BLENDS = ("contrast", "color", "sharpness")
"""Operations that mix the image with another one made of it, by a factor."""
WHOLE = ("auto_contrast", "equalize")
"""Operations without an argument, by the image's histogram."""
BLUR = "gaussian_blur"
BICUBIC = 3
"""PIL's number of that way to resample."""


@dataclass(frozen=True)
class Slice:
    """Where an array lies in a plan's numbers, and what it is."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, numbers: Tensor) -> Tensor:
        return numbers[self.start : self.start + math.prod(self.shape)].view(self.shape).to(self.dtype)


@dataclass(frozen=True)
class Operation:
    """One kind of operation on several clips' frames."""

    kind: str
    arrays: dict[str, Slice]
    """`frames`, the frames' places in the batch, and what each of them, or for `affine` each clip, takes."""


@dataclass(frozen=True)
class Drawn:
    """One operation of a clip's draw."""

    kind: str
    """timm's name of the function."""
    argument: float = 0.0
    cubic: bool = False
    """Of the geometric ones: resampled bicubically, otherwise bilinearly."""


class Augmentation:
    """timm's RandAugment by its string (`rand-m7-n4-mstd0.5-inc1`).

    Raises:
        UserError: no such string.
    """

    def __init__(self, name: str) -> None:
        from timm.data.auto_augment import rand_augment_transform

        try:
            self._transform: Any = rand_augment_transform(name, {"translate_const": 100})
        except Exception as error:
            raise UserError(f"data.augment={name} is neither `none` nor a timm RandAugment string: {error}") from None
        for op in self._transform.ops:
            kind = "color" if op.aug_fn.__name__ == "desaturate" else op.aug_fn.__name__
            if kind not in (*GEOMETRIC, *TABLES, *BLENDS, *WHOLE, BLUR):
                raise UserError(f"data.augment={name} has the operation {op.name}, which is not known here")
            op.aug_fn = partial(_note, kind, desaturating=op.aug_fn.__name__ == "desaturate")

    def draw(self, seed: int) -> list[Drawn]:
        """What timm would do to an image after `random` and NumPy are given this seed; both are left as they were."""
        state, numpy_state = random.getstate(), np.random.get_state()
        try:
            random.seed(seed)
            np.random.seed(seed % 2**32)
            found: list[Drawn] = self._transform([])
            return found
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)

    def plan(self, seeds: Sequence[int], counts: Sequence[int], height: int, width: int) -> Plan:
        """Of a batch whose clips have these seeds and numbers of frames, one clip after another."""
        return plan_of([self.draw(seed) for seed in seeds], counts, height, width)


def augmentation(name: str) -> Augmentation | None:
    """Of the setting `data.augment`; None for `none`."""
    return None if name == "none" else Augmentation(name)


def _note(kind: str, done: list[Drawn], *arguments: float, desaturating: bool, **options: Any) -> list[Drawn]:
    """In place of timm's function of an image: `done` and this operation, with the same calls of `random`."""
    resample = options["resample"]
    if kind in GEOMETRIC and isinstance(resample, list | tuple):
        resample = random.choice(resample)
    argument = float(arguments[0]) if arguments else 0.0
    if desaturating:
        argument = min(1.0, max(0.0, 1.0 - argument))
    return [*done, Drawn(kind, argument, kind in GEOMETRIC and resample == BICUBIC)]


def plan_of(draws: Sequence[Sequence[Drawn]], counts: Sequence[int], height: int, width: int) -> Plan:
    """The operations of several clips' draws; `counts` are the clips' frames, which lie one after another."""
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
    """One operation of each clip that has one, those of a kind together."""
    groups: dict[tuple[Any, ...], list[tuple[Drawn, range]]] = {}
    for op, frames in now:
        key: tuple[Any, ...] = ("table" if op.kind in TABLES else op.kind,)
        if op.kind in GEOMETRIC:  # clips of as many frames
            key = ("affine", len(frames))
        groups.setdefault(key, []).append((op, frames))
    for (kind, *_), members in groups.items():
        if kind == "affine":
            places = np.array([list(frames) for _, frames in members])
            matrices = np.array([matrix(op, height, width) for op, _ in members])
            cubic = np.array([op.cubic for op, _ in members])
            yield (
                kind,
                {
                    "frames": (places, torch.int64),
                    "matrix": (matrices, torch.float64),
                    "cubic": (cubic, torch.bool),
                },
            )
            continue
        each = [op for op, frames in members for _ in frames]
        arrays = {"frames": (np.array([place for _, frames in members for place in frames]), torch.int64)}
        if kind == "table":
            arrays["table"] = (np.stack([_table(op) for op in each]), torch.uint8)
        elif kind in BLENDS:
            arrays["factor"] = (np.array([op.argument for op in each]), torch.float32)
        elif kind == BLUR:
            arrays["weights"] = (np.array([box_weights(op.argument) for op in each]), torch.int64)
        yield kind, arrays


def _table(op: Drawn) -> Array:
    """What each of the 256 values becomes."""
    values = np.arange(256)
    if op.kind == "invert":
        values = 255 - values
    elif op.kind == "posterize":
        values &= 256 - (1 << max(0, 8 - int(op.argument)))
    elif op.kind == "solarize":
        values = np.where(values < op.argument, values, 255 - values)
    elif op.kind == "solarize_add":
        values = np.where(values < 128, np.minimum(255, values + int(op.argument)), values)
    else:  # brightness: a blend with black, in single precision as PIL has it
        values = np.clip(np.float32(op.argument) * values.astype(np.float32), 0, 255)
    return values.astype(np.uint8)


def matrix(op: Drawn, height: int, width: int) -> list[float]:
    """(a, b, c, d, e, f): an output pixel's centre (x, y) shows the input at (ax + by + c, dx + ey + f)."""
    if op.kind == "rotate":
        angle = -math.radians(op.argument % 360.0)
        cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
        x, y = width / 2, height / 2  # the point that stays
        return [cosine, sine, cosine * -x + sine * -y + x, -sine, cosine, -sine * -x + cosine * -y + y]
    return {
        "shear_x": [1, op.argument, 0, 0, 1, 0],
        "shear_y": [1, 0, 0, op.argument, 1, 0],
        "translate_x_rel": [1, 0, op.argument * width, 0, 1, 0],
        "translate_y_rel": [1, 0, 0, 0, 1, op.argument * height],
    }[op.kind]


BLUR_REACH = 3
"""Pixels to each side that a box can hold; timm's blurs have radius 2 at most, their boxes 2 and a part."""
BLUR_PASSES = 3


def box_weights(radius: float) -> list[int]:
    """Weights, in 2^-24, of the box whose three passes stand for a Gaussian of this radius (its sigma).

    The box (Gwosdek et al., 2011) holds whole pixels to each side and a part of one more, so that its variance is the
    third of the Gaussian's.
    """
    one, sigma = np.float32(1), np.float32(radius)  # in single precision, as PIL has it
    variance = sigma * sigma / np.float32(BLUR_PASSES)
    whole = math.floor((math.sqrt(12.0 * float(variance) + 1.0) - 1.0) / 2.0)
    next_one = np.float32(whole + 1)
    part = np.float32(2 * whole + 1) * (np.float32(whole) * next_one - 3 * variance)
    part /= 6 * (variance - next_one * next_one)
    inner = int(np.float32(2**24) / ((whole + part) * 2 + one))
    outer = (2**24 - (whole * 2 + 1) * inner) // 2
    reach = range(-BLUR_REACH, BLUR_REACH + 1)
    return [inner if abs(at) <= whole else outer if abs(at) == whole + 1 else 0 for at in reach]
