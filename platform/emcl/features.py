"""What a model makes of videos and of sentences, to be compared, kept and taken to other tasks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from emcl.em import SharedFactors
from emcl.errors import UserError
from emcl.model.pooling import mean_of_frames


@dataclass(eq=False)
class VideoFeatures:
    """Of some videos, on the CPU."""

    frames: Tensor  # (n, T, D) embeddings of the frames
    mask: Tensor  # (n, T) which of them there are
    outputs: Tensor | None = None  # (n, W) mean over the frames of what the image trunk puts out
    _kept: tuple[SharedFactors, Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.frames)

    def mean(self) -> Tensor:
        """One vector a video (n, D): the mean of its frames."""
        return mean_of_frames(self.frames, self.mask)

    def factor_vectors(self, factors: SharedFactors) -> Tensor:
        """(n, K + 2), made once.

        Raises:
            UserError: there are no `outputs`.
        """
        if self._kept is None or self._kept[0] is not factors:
            self._kept = factors, factors.video_vectors(self.needed_outputs())
        return self._kept[1]

    def needed_outputs(self) -> Tensor:
        """Raises UserError: there are none."""
        return _needed(self.outputs)

    @staticmethod
    def join(parts: list[VideoFeatures]) -> VideoFeatures:
        """One after the other, each with its outputs; at least one."""
        return VideoFeatures(
            torch.cat([part.frames for part in parts]),
            torch.cat([part.mask for part in parts]),
            torch.cat([part.needed_outputs() for part in parts]),
        )


@dataclass(eq=False)
class TextFeatures:
    """Of some sentences, on the CPU."""

    embeddings: Tensor  # (n, D)
    outputs: Tensor | None = None  # (n, W) what the text trunk puts out

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: slice) -> TextFeatures:
        return TextFeatures(self.embeddings[rows], None if self.outputs is None else self.outputs[rows])

    def factor_vectors(self, factors: SharedFactors) -> Tensor:
        """(n, K + 2), as of `VideoFeatures`."""
        return factors.text_vectors(self.needed_outputs())

    def needed_outputs(self) -> Tensor:
        """Raises UserError: there are none."""
        return _needed(self.outputs)


def _needed(outputs: Tensor | None) -> Tensor:
    if outputs is None:
        raise UserError(
            "these features lack what shared factors compare: give videos and sentences themselves, what encode_video "
            "and encode_queries make of them, or factors=False to emcl.load"
        )
    return outputs
