"""RandAugment's image operations on batches of uint8 frames (n, H, W, 3), equivalent to PIL's on single images.

They run on the frames' device (CPU or GPU) without synchronisation: everything that determines shapes is in the plan
(data/augment.py), which the host made. Results equal PIL's bit for bit, except for resampled ones (rotate, shear,
translate): these use the same pixels and weights, but sum in single precision where PIL uses double, so a few pixels
differ by 1: one in ten thousand, or one in a hundred if a bilinear shift is a simple fraction of a pixel, since exact
values are then integers that PIL's sums sometimes miss. `posterize` to 0 bits gives black; in PIL 13 it fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from emcl.data.augment import BLUR_PASSES, BLUR_REACH, Plan
from emcl.data.batch import Batch

FILL = 128
"""Pixel value outside the frame, as in timm."""
FRAMES_AT_ONCE = {"cpu": 12, "cuda": 192}
"""Chunk sizes that fit a CPU's cache and limit a GPU's memory."""
NUDGE = 2.0**-11
"""Added before a resampled value is truncated to an integer: weights sum to 1 only up to rounding."""


def augmented(batch: Batch) -> Batch:
    """Augments the batch's frames by its plan, if it has one."""
    if batch.augmentation is None or batch.videos is None:
        return batch
    videos = replace(batch.videos, frames=augment(batch.videos.frames, batch.augmentation))
    return replace(batch, videos=videos, augmentation=None)


@torch.no_grad()
def augment(frames: Tensor, plan: Plan) -> Tensor:
    """Returns augmented frames (n, H, W, 3) uint8; does not modify `frames`."""
    frames = frames.clone()
    at_once = FRAMES_AT_ONCE.get(frames.device.type, FRAMES_AT_ONCE["cpu"])
    for operation in plan["operations"]:
        work = {name: where.of(plan["numbers"]) for name, where in operation.arrays.items()}
        step = at_once
        if operation.kind == "affine":
            step = max(1, at_once // work["frames"].shape[1])
        for first in range(0, len(work["frames"]), step):
            chunk = {name: array[first : first + step] for name, array in work.items()}
            indices = chunk.pop("frames")
            chosen = frames.index_select(0, indices.flatten()).view(*indices.shape, *frames.shape[1:])
            made = OPERATIONS[operation.kind](chosen, **chunk)
            frames.index_copy_(0, indices.flatten(), made.reshape(-1, *frames.shape[1:]))
    return frames


def table(frames: Tensor, table: Tensor) -> Tensor:
    """Maps each value by its frame's table (n, 256)."""
    return _looked_up(frames, table[:, None].expand(-1, 3, -1))


def auto_contrast(frames: Tensor) -> Tensor:
    """Stretches each channel to 0 to 255."""
    flat = frames.flatten(1, 2)
    low, high = (extreme.double()[..., None] for extreme in (flat.amin(1), flat.amax(1)))  # (n, 3, 1)
    values = torch.arange(256, device=frames.device, dtype=torch.float64)
    scale = 255.0 / (high - low)
    stretched = (values * scale + -low * scale).clamp(0, 255)
    return _looked_up(frames, torch.where(high > low, stretched, values).to(torch.uint8))


def equalize(frames: Tensor) -> Tensor:
    """Equalizes each channel's histogram."""
    index = _table_index(frames).flatten().long()
    histogram = torch.zeros(len(frames) * 3 * 256, dtype=torch.int32, device=frames.device)
    histogram = histogram.scatter_add_(0, index, torch.ones_like(index, dtype=torch.int32)).view(-1, 3, 256)
    values = torch.arange(256, device=frames.device)
    last = torch.where(histogram > 0, values, 0).amax(-1, keepdim=True)
    step = (histogram.sum(-1, keepdim=True) - histogram.gather(-1, last)) // 255
    before = histogram.cumsum(-1) - histogram
    spread = ((step // 2 + before) // step.clamp_min(1)).clamp_max(255)
    return _looked_up(frames, torch.where(step > 0, spread, values).to(torch.uint8))


def contrast(frames: Tensor, factor: Tensor) -> Tensor:
    """Blends each frame with the mean of its greyscale version."""
    area = frames.shape[1] * frames.shape[2]
    mean = (_grey(frames).flatten(1).sum(1).double() / area + 0.5).floor().float()[:, None]  # (n, 1)
    values = torch.arange(256, device=frames.device, dtype=torch.float32)
    return table(frames, _blend(mean, values, factor[:, None]))


def color(frames: Tensor, factor: Tensor) -> Tensor:
    """Blends each frame with its greyscale version."""
    return _blend(_grey(frames)[..., None].float(), frames.float(), factor[:, None, None, None])


def sharpness(frames: Tensor, factor: Tensor) -> Tensor:
    """Blends with a smoothed version: the pixel with weight 5 and its eight neighbours; the border is unchanged."""
    exact = frames.float()
    rows = exact[:, :-2] + exact[:, 1:-1] + exact[:, 2:]
    sums = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * exact[:, 1:-1, 1:-1]
    smooth = exact.clone()
    smooth[:, 1:-1, 1:-1] = ((sums + 6.5) / 13).floor()
    return _blend(smooth, exact, factor[:, None, None, None])


def gaussian_blur(frames: Tensor, weights: Tensor) -> Tensor:
    """Three box filters along rows, then three along columns; `weights` (n, 7) of a box are in units of 2^-24."""
    for along in (2, 1):
        size = frames.shape[along]
        for _ in range(BLUR_PASSES):
            sums = torch.zeros(frames.shape, dtype=torch.int64, device=frames.device)
            for number in range(2 * BLUR_REACH + 1):
                positions = torch.arange(size, device=frames.device).add_(number - BLUR_REACH).clamp_(0, size - 1)
                sums += frames.index_select(along, positions).long() * weights[:, number, None, None, None]
            frames = ((sums + (1 << 23)) >> 24).to(torch.uint8)
    return frames


def affine(clips: Tensor, matrix: Tensor, cubic: Tensor) -> Tensor:
    """Resamples clips (c, T, H, W, 3), each by its matrix (c, 6); positions are computed in double precision.

    Bicubic where `cubic` (c,) is set, otherwise bilinear. Both use 16 input pixels per output pixel in one call, since
    on a GPU the launches from the host are a bottleneck before memory is.
    """
    count, length, height, width, _ = clips.shape
    a, b, c, d, e, f = matrix[:, :, None, None].unbind(1)
    x = torch.arange(width, device=clips.device, dtype=torch.float64) + 0.5
    y = (torch.arange(height, device=clips.device, dtype=torch.float64) + 0.5)[:, None]
    from_x, from_y = a * x + b * y + c, d * x + e * y + f  # (c, H, W)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    columns, x_weights = _taps(from_x, width, cubic)
    rows, y_weights = _taps(from_y, height, cubic)
    first = torch.arange(count, device=clips.device, dtype=torch.int32)[:, None, None, None, None] * (height * width)
    index = (rows[..., :, None] * width + columns[..., None, :] + first).flatten(0, 2).flatten(1)
    weights = (y_weights[..., :, None] * x_weights[..., None, :]).flatten(0, 2).flatten(1)
    # one row holds a pixel position in all frames of the clip, so that they are gathered and weighted together
    pixels = clips.permute(0, 2, 3, 1, 4).reshape(count * height * width, length * 3).float()
    resampled = F.embedding_bag(index, pixels, per_sample_weights=weights, mode="sum")
    resampled = torch.where(inside.view(-1, 1), resampled.add_(NUDGE).clamp_(0, 255), FILL).to(torch.uint8)
    return resampled.view(count, height, width, length, 3).permute(0, 3, 1, 2, 4)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "table": table,
    "auto_contrast": auto_contrast,
    "equalize": equalize,
    "contrast": contrast,
    "color": color,
    "sharpness": sharpness,
    "gaussian_blur": gaussian_blur,
    "affine": affine,
}
"""Name in a plan -> function."""


def _taps(position: Tensor, size: int, cubic: Tensor) -> tuple[Tensor, Tensor]:
    """The four nearest pixels of each position on a line of `size` pixels (clamped at the border) and their weights."""
    middle = position - 0.5  # pixel k's centre is at k + 0.5
    before = middle.floor()
    t = (middle - before).float()
    t2 = t * t
    t3 = t2 * t
    smooth = torch.stack([2 * t2 - t - t3, 1 - 2 * t2 + t3, t + t2 - t3, t3 - t2], -1)  # the kernel with slope -1
    straight = F.pad(torch.stack([1 - t, t], -1), (1, 1))
    weights = torch.where(cubic[:, None, None, None], smooth, straight)
    steps = torch.arange(-1, 3, device=position.device, dtype=torch.int32)
    return (before.int()[..., None] + steps).clamp_(0, size - 1), weights


def _blend(one: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """Interpolates from `one` (factor 0) to `other` (factor 1), or extrapolates; truncates to integers."""
    return (one + factor * (other - one)).clamp(0, 255).to(torch.uint8)


def _grey(frames: Tensor) -> Tensor:
    """(n, H, W) int32: ITU-R 601 luma, computed with weights in units of 2^-16."""
    red, green, blue = frames.int().unbind(-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16


def _table_index(frames: Tensor) -> Tensor:
    """Each value's index in flattened tables (n, 3, 256)."""
    tables = torch.arange(len(frames) * 3, device=frames.device, dtype=torch.int32).view(-1, 1, 1, 3)
    return frames.int() + 256 * tables


def _looked_up(frames: Tensor, tables: Tensor) -> Tensor:
    """Maps each value by its frame's and channel's table; tables are (n, 3, 256)."""
    return tables.flatten().index_select(0, _table_index(frames).flatten()).view_as(frames)
