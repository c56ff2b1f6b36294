"""The batch that the loaders build and the model takes."""

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
    """B videos of up to T frames. Short videos are not padded, so a batch costs only the frames that it has."""

    frames: Tensor
    """The frames of all videos, concatenated: (n, H, W, 3) uint8, or (n, W) outputs of a frozen image trunk."""
    slots: Tensor  # (n,) each frame's index in the flattened (B, T)
    mask_BT: Tensor
    """bool; True where a video has a frame."""

    def __len__(self) -> int:
        return len(self.mask_BT)

    def to(self, device: torch.device) -> VideoFrames:
        return to_device(self, device)


def videos_of(clips: Sequence[Clip], most: int) -> VideoFrames:
    """Concatenates clips of up to `most` frames each."""
    mask = np.zeros((len(clips), most), bool)
    for row, clip in enumerate(clips):
        mask[row, : len(clip)] = True
    mask_BT = torch.from_numpy(mask)
    slots = mask_BT.flatten().nonzero().squeeze(1)
    return VideoFrames(frames=torch.from_numpy(np.concatenate(clips)), slots=slots, mask_BT=mask_BT)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """A rank's samples of one micro-batch, with loading times and the samples that failed to decode."""

    ids: list[str]
    rows: list[int]
    """Each sample's row in the shards."""
    videos: VideoFrames | None
    """None if no sample could be decoded."""
    video_B: Tensor | None = None
    """Identifies each sample's video (`number_of`): samples with the same number are not negatives of each other."""
    tasks: dict[str, Any] = field(default_factory=dict)
    """Task name -> output of its collator: tensors in dictionaries, lists or dataclasses."""
    augmentation: Plan | None = None
    """In training, how the frames are augmented; data/image_ops.py applies it on the device."""
    bad: list[str] = field(default_factory=list)
    """Samples that did not decode, and why."""
    loading: LoadingTime = field(default_factory=LoadingTime)

    @property
    def frame_count(self) -> int:
        """Number of frames of all videos together."""
        return 0 if self.videos is None else len(self.videos.frames)

    def to(self, device: torch.device) -> Batch:
        return to_device(self, device)

    def pin_memory(self) -> Batch:
        """PyTorch's loaders call this method when there is a GPU."""
        return each_tensor(self, Tensor.pin_memory)


def each_tensor(item: Item, change: Callable[[Tensor], Tensor]) -> Item:
    """Applies `change` to every tensor of `item`, also inside dictionaries, lists, tuples and dataclasses."""
    changed: Any = item
    if isinstance(item, Tensor):
        changed = change(item)
    elif isinstance(item, dict):
        changed = {key: each_tensor(value, change) for key, value in item.items()}
    elif isinstance(item, tuple) and hasattr(item, "_fields"):  # a namedtuple
        changed = type(item)(*(each_tensor(value, change) for value in item))
    elif isinstance(item, list | tuple):
        changed = type(item)(each_tensor(value, change) for value in item)
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        values = {one.name: getattr(item, one.name) for one in dataclasses.fields(item) if one.init}
        changed = dataclasses.replace(item, **{name: each_tensor(value, change) for name, value in values.items()})
    return changed


def to_device(item: Item, device: torch.device) -> Item:
    """Moves every tensor; the host does not wait for the copies."""
    return each_tensor(item, lambda tensor: tensor.to(device, non_blocking=True))


def number_of(sample: Sample, row: int) -> int:
    """A 64-bit number that identifies a sample's video; the same in every process.

    A benchmark's `id` identifies a video across all sets of a mixture. Ids of user folders are file names, which two
    sets may share, so there each row of the shards counts as a separate video.
    """
    named = sample.source not in ("", OWN_FOLDER)
    key = f"{sample.source}\0{sample.id}" if named else f"row\0{row}"
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "big", signed=True)
