"""Features of any model, in NumPy's files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emcl.errors import UserError, first_line


@dataclass(frozen=True)
class Features:
    """Two modalities, from `.npy` files."""

    video: NDArray[np.float32]  # (videos, D_v)
    text: NDArray[np.float32]  # (texts, D_t)

    @property
    def same_width(self) -> bool:
        """Whether they may be of one space."""
        return self.video.shape[1] == self.text.shape[1]

    @staticmethod
    def read(video: Path, text: Path, *, one_space: bool = False) -> Features:
        """Raises UserError: a file that is no (n, D) array of finite numbers; with `one_space`, different widths."""
        pair = Features(read_rows(video), read_rows(text))
        if one_space and not pair.same_width:
            raise UserError(f"{video} has width {pair.video.shape[1]}, {text} {pair.text.shape[1]}: not one space")
        return pair


def read_rows(path: Path) -> NDArray[np.float32]:
    rows = _read(path)
    if rows.ndim != 2 or not rows.size or rows.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}; wanted are feature rows, numbers (n, D)")
    rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        bad = int(np.argmin(np.isfinite(rows).all(1)))
        raise UserError(f"{path}: row {bad} is not finite")
    return rows


def read_owner(path: Path | None, features: Features, option: str) -> NDArray[np.int64]:
    """(texts,) each text's video; without a file, text i belongs to video i.

    Args:
        option: that names the file.

    Raises:
        UserError: not one row of `video` for each text.
    """
    texts, videos = len(features.text), len(features.video)
    if path is None:
        if texts != videos:
            raise UserError(f"{texts} texts and {videos} videos: name each text's video by {option} FILE.npy")
        return np.arange(texts)
    owner = _read(path)
    if owner.shape != (texts,) or owner.dtype.kind not in "iu" or owner.min() < 0 or owner.max() >= videos:
        raise UserError(f"{path}: wanted are {texts} whole numbers from 0 to {videos - 1}, a text's row of the videos")
    return owner.astype(np.int64)


def _read(path: Path) -> NDArray[Any]:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a NumPy array file: {first_line(error)}") from None
    if not isinstance(rows, np.ndarray):
        raise UserError(f"{path} is an archive of several arrays: write one array with numpy.save")
    return rows
