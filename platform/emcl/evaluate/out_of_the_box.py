"""The compact EMCL on features of any model: recall before and after, and the corrected features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from emcl.em import EMCL
from emcl.errors import UserError, first_line
from emcl.evaluate.results import lines_of
from emcl.metrics.retrieval_metrics import retrieval_metrics

Metrics = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Features:
    """Two modalities of one latent space, from `.npy` files."""

    video: NDArray[np.float32]  # (videos, D)
    text: NDArray[np.float32]  # (texts, D)

    @staticmethod
    def read(video: Path, text: Path) -> Features:
        """Raises UserError: a file that is no (n, D) array of finite numbers, or two of different widths."""
        pair = Features(read_rows(video), read_rows(text))
        if pair.video.shape[1] != pair.text.shape[1]:
            raise UserError(f"{video} has width {pair.video.shape[1]}, {text} {pair.text.shape[1]}: not one space")
        return pair


def read_rows(path: Path) -> NDArray[np.float32]:
    rows = _read(path)
    if rows.ndim != 2 or not len(rows) or rows.dtype.kind not in "fiu":
        raise UserError(f"{path} holds {rows.dtype} of shape {rows.shape}; wanted are feature rows, numbers (n, D)")
    rows = rows.astype(np.float32)
    if not np.isfinite(rows).all():
        bad = int(np.argmin(np.isfinite(rows).all(1)))
        raise UserError(f"{path}: row {bad} is not finite")
    return rows


def read_owner(path: Path | None, features: Features) -> NDArray[np.int64]:
    """(texts,) each text's video; without a file, text i belongs to video i.

    Raises:
        UserError: not one row of `video` for each text.
    """
    texts, videos = len(features.text), len(features.video)
    if path is None:
        if texts != videos:
            raise UserError(f"{texts} texts and {videos} videos: name each text's video by --video-of-text FILE.npy")
        return np.arange(texts)
    owner = _read(path)
    if owner.shape != (texts,) or owner.dtype.kind not in "iu" or owner.min() < 0 or owner.max() >= videos:
        raise UserError(f"{path}: wanted are {texts} whole numbers from 0 to {videos - 1}, a text's row of the videos")
    return owner.astype(np.int64)


def recall(features: Features, owner: NDArray[np.int64]) -> Metrics:
    """Recall by the cosines of texts and videos."""
    text, video = (F.normalize(torch.from_numpy(rows), dim=1) for rows in (features.text, features.video))
    return retrieval_metrics((text @ video.T).numpy(), owner)


def fit(features: Features, *, bases: int, beta: float, balance: float) -> EMCL:
    """A compact layer fitted to the features.

    Raises:
        UserError: more bases than the features are wide, or none.
    """
    try:
        layer = EMCL(variant="compact", bases=bases, beta=beta, balance=balance)
        return layer.fit(features.video, features.text).eval()
    except ValueError as error:
        raise UserError(str(error)) from None


def open_layer(path: Path) -> EMCL:
    """The layer that `write` saved.

    Raises:
        UserError: no such file, or something else is in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `emcl transform` writes bases.pt")
    try:
        return EMCL.load(path)
    except Exception:  # torch.load raises many kinds of error for other files, with unsafe advice
        raise UserError(f"{path} holds no EMCL bases; `emcl transform` writes bases.pt") from None


def transform(layer: EMCL, features: Features) -> Features:
    """Raises UserError: the layer's bases are of another width."""
    try:
        return Features(layer.transform(features.video), layer.transform(features.text))
    except ValueError as error:
        raise UserError(str(error)) from None


def write(folder: Path, features: Features, layer: EMCL) -> None:
    """`video.npy`, `text.npy` and `bases.pt`, which `emcl.EMCL.load` opens."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "video.npy", features.video)
    np.save(folder / "text.npy", features.text)
    layer.save(folder / "bases.pt")


def comparison(before: Metrics, after: Metrics) -> str:
    """Both, as a table."""
    return lines_of(
        {
            f"{direction}, {when}/{name}": value
            for direction in before
            for when, metrics in (("before", before), ("after", after))
            for name, value in metrics[direction].items()
        }
    )


def _read(path: Path) -> NDArray[Any]:
    try:
        rows = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} is not a NumPy array file: {first_line(error)}") from None
    if not isinstance(rows, np.ndarray):
        raise UserError(f"{path} is an archive of several arrays: write one array with numpy.save")
    return rows
