"""A split's saved embeddings, from which scores can be computed again, in other ways, without encoding anything."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from emcl.errors import UserError
from emcl.model.pair_scores import NO_FACTORS
from emcl.model.pooling import mean_of_frames


@dataclass(frozen=True)
class Embeddings:
    """Texts and videos of one split, on the CPU."""

    text: Tensor  # (texts, D)
    frames: Tensor  # (videos, T, D)
    mask: Tensor  # (videos, T) bool
    owner: NDArray[np.int64]  # (texts,) each text's video, as its index in `frames`
    sentences: list[str]
    videos: list[str]
    """The samples' ids."""
    text_factors: Tensor | None = None  # (texts, K + 2)
    video_factors: Tensor | None = None  # (videos, K + 2)
    """The vectors of the model's shared factors, whose inner products are log-likelihood ratios; both or neither."""
    factors: str = NO_FACTORS
    """Which those are (`fingerprint_of`)."""
    model: str = ""
    """A hash of the weights that encoded them, where that is kept."""

    @property
    def video_means(self) -> Tensor:
        """Means over frames, (videos, D)."""
        return mean_of_frames(self.frames, self.mask)

    def one_sentence(self) -> Embeddings:
        """With only each video's first text."""
        first = np.flatnonzero(np.diff(self.owner, prepend=-1))
        kept, sentences = torch.from_numpy(first), [self.sentences[index] for index in first]
        factors = None if self.text_factors is None else self.text_factors[kept]
        return replace(self, text=self.text[kept], owner=self.owner[first], sentences=sentences, text_factors=factors)

    def save(self, path: Path) -> None:
        tensors = {
            "text": self.text.contiguous(),
            "frames": self.frames[self.mask].contiguous(),  # only frames that are present
            "mask": self.mask.contiguous(),
            "owner": torch.from_numpy(self.owner),
        }
        if self.text_factors is not None and self.video_factors is not None:
            tensors |= {"text_factors": self.text_factors, "video_factors": self.video_factors}
        names = {"sentences": json.dumps(self.sentences), "videos": json.dumps(self.videos)}
        names |= {"factors": json.dumps(self.factors), "model": json.dumps(self.model)}
        save_file(tensors, path, metadata=names)

    @classmethod
    def open(cls, path: Path) -> Embeddings:
        """Raises UserError: there is no such file, or it holds something else."""
        try:
            with safe_open(path, "pt") as file:
                packed, mask = file.get_tensor("frames"), file.get_tensor("mask")
                frames = packed.new_zeros(*mask.shape, packed.shape[1])
                frames[mask] = packed
                names = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
                owner = file.get_tensor("owner").numpy()
                with_factors = "text_factors" in file.keys()  # noqa: SIM118, it is no dictionary
                factors = [file.get_tensor(f"{side}_factors") for side in ("text", "video") if with_factors]
                made_with = {key: names[key] for key in ("factors", "model") if key in names}
                kept = file.get_tensor("text"), frames, mask, owner, names["sentences"], names["videos"], *factors
                return cls(*kept, **made_with)
        except (OSError, SafetensorError, KeyError, ValueError):
            raise UserError(f"{path} holds no embeddings: `emcl evaluate {path.parent}` writes them") from None
