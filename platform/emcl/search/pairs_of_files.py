"""A user's own pairs, files of the indexed folder and their captions, and the shared factors of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from emcl.errors import UserError
from emcl.features import VideoFeatures
from emcl.inference import VideoTextModel
from emcl.prepare.clips import Clip
from emcl.prepare.videos import Videos


def paths_of(pairs: Sequence[Clip], videos: Path) -> list[str]:
    """Each pair's file, as the index of this folder names it.

    Raises:
        UserError: one is not in the folder.
    """
    places = list(map(Videos(videos).find, (clip.file for clip in pairs)))
    missing = [clip.file for clip, place in zip(pairs, places, strict=True) if place is None]
    if missing:
        how_many = f"{len(missing)} of {len(pairs)} are missing"
        raise UserError(f"{videos} has no {missing[0]}, which the pairs name ({how_many})")
    return [place.name for place in places if place is not None]


def fit_to_pairs(
    model: VideoTextModel, pairs: Sequence[Clip], paths: Sequence[str], outputs: Iterable[Sequence[np.ndarray]]
) -> None:
    """Fits the model's shared factors. A pair's video is the mean of its file's windows, or of those in its part.

    Parts of one file show nearly the same, so they are not divided between folds.

    Args:
        outputs: what the image trunk puts out for each pair's windows, (W,) each; none for a file that does not decode,
            whose pairs do not count.

    Raises:
        UserError: no factors can be fitted to them.
    """
    rows: list[np.ndarray] = []
    texts: list[str] = []
    owner: list[int] = []
    files: list[int] = []
    numbers = {path: number for number, path in enumerate(dict.fromkeys(paths))}
    for clip, path, of_windows in zip(pairs, paths, outputs, strict=True):
        if of_windows and clip.captions:
            owner += [len(rows)] * len(clip.captions)
            texts += clip.captions
            files.append(numbers[path])
            rows.append(np.mean(of_windows, axis=0))
    if not rows:
        raise UserError("none of the pairs has a video that decodes and a caption")
    no_frames = torch.zeros(len(rows), 0, 0), torch.zeros(len(rows), 0, dtype=torch.bool)
    model.fit_factors(VideoFeatures(*no_frames, torch.from_numpy(np.stack(rows))), texts, owner, group=files)
