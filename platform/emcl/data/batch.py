"""A batch as the loaders make it and the model takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emcl.data.augment import Plan
from emcl.data.loading_time import LoadingTime
from emcl.data.samples import OWN_FOLDER, Sample

Item = TypeVar("Item")
Clip = NDArray[Any]
"""(n, H, W, 3) uint8 frames, or (n, W) outputs of a frozen image trunk."""


@dataclass(frozen=True, kw_only=True)
class VideoFrames:
    """B videos of up to T frames; short ones are not padded: a batch costs the frames that it holds."""

    frames: Tensor
    """All frames, one video's after another's: (n, H, W, 3) uint8, or (n, W) outputs of a frozen image trunk."""
    slots: Tensor  # (n,) each frame's place in the flattened (B, T)
    mask_BT: Tensor
    """Which frames there are, bool."""

    def __len__(self) -> int:
        return len(self.mask_BT)

    def to(self, device: torch.device) -> VideoFrames:
        return to_device(self, device)


def videos_of(clips: Sequence[Clip], most: int) -> VideoFrames:
    """Clips of up to `most` frames each, joined."""
    mask = np.zeros((len(clips), most), bool)
    for row, clip in enumerate(clips):
        mask[row, : len(clip)] = True
    mask_BT = torch.from_numpy(mask)
    slots = mask_BT.flatten().nonzero().squeeze(1)
    return VideoFrames(frames=torch.from_numpy(np.concatenate(clips)), slots=slots, mask_BT=mask_BT)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's samples of one micro-batch, and what loading them has shown."""

    ids: list[str]
    rows: list[int]
    """Each sample's place in the shards."""
    videos: VideoFrames | None
    """None where no sample has decoded."""
    video_B: Tensor | None = None
    """Which video each sample is of (`number_of`): those with one number are no negatives of each other."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """Of each task by name what its collator made: tensors in dictionaries, lists or dataclasses."""
    augmentation: Plan | None = None
    """In training, how the frames are to be changed; data/image_ops.py does it on the device."""
    bad: list[str] = field(default_factory=list)
    """Samples that did not decode, and why."""
    loading: LoadingTime = field(default_factory=LoadingTime)

    @property
    def frame_count(self) -> int:
        """Of all videos together."""
        return 0 if self.videos is None else len(self.videos.frames)

    def to(self, device: torch.device) -> Batch:
        return to_device(self, device)

    def pin_memory(self) -> Batch:
        """The name that PyTorch's loaders look for, where there is a GPU."""
        return each_tensor(self, Tensor.pin_memory)


def each_tensor(item: Item, change: Callable[[Tensor], Tensor]) -> Item:
    """`item` with every tensor in it changed: in dictionaries, lists, tuples and dataclasses."""
    found: Any = item
    if isinstance(item, Tensor):
        found = change(item)
    elif isinstance(item, dict):
        found = {key: each_tensor(value, change) for key, value in item.items()}
    elif isinstance(item, tuple) and hasattr(item, "_fields"):  # a named one
        found = type(item)(*(each_tensor(value, change) for value in item))
    elif isinstance(item, list | tuple):
        found = type(item)(each_tensor(value, change) for value in item)
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        values = {one.name: getattr(item, one.name) for one in dataclasses.fields(item) if one.init}
        found = dataclasses.replace(item, **{name: each_tensor(value, change) for name, value in values.items()})
    return found


def to_device(item: Item, device: torch.device) -> Item:
    """With every tensor moved; the host does not wait for it."""
    return each_tensor(item, lambda tensor: tensor.to(device, non_blocking=True))


def number_of(sample: Sample, row: int) -> int:
    """Of a sample's video, in 64 bits; the same in every process.

    A benchmark's `id` says which video it is, in whichever set of a mixture. Ids of people's own folders are file
    names, which two sets may share: there each row of the shards is a video of its own.
    """
    named = sample.source not in ("", OWN_FOLDER)
    key = f"{sample.source}\0{sample.id}" if named else f"row\0{row}"
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)
