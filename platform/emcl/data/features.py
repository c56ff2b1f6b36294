"""Remembered outputs of frozen towers, beside the shards they were computed from.

For every shard there is a tar of `KEY.safetensors` with `frames` (n, W) and `captions` (c, W'), in a folder named by
a fingerprint of everything that they depend on: model, weights, transform and the shard itself. Another model or
size never finds a stale one.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load, save
from torch import Tensor

from emcl.config import Config
from emcl.data.text import Caption

Feature = dict[str, Tensor]


def fingerprint(config: Config, architecture: Mapping[str, Any], shard: Path) -> str:
    """Of all that a shard's features depend on; `architecture` is the model's JSON, which may change under its name."""
    image_and_text = [config.model.image_weights, architecture["text_cfg"].get("hf_model_name")]
    weights = [config.model.pretrained, *image_and_text]
    random = config.model.pretrained is None and None in image_and_text
    facts: dict[str, Any] = {
        "version": 4,
        "model": config.model.name,
        "architecture": dict(architecture),
        "weights": [_stamp(Path(path)) if path and Path(path).exists() else path for path in weights],
        "seed": config.seed if random else None,
        "transform": [config.data.frames, config.data.fps, config.data.size, config.data.words, config.data.keyframes],
        "shard": _stamp(shard),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def feature_path(config: Config, architecture: Mapping[str, Any], shard: Path) -> Path:
    return shard.parent / "features" / fingerprint(config, architecture, shard) / shard.name


def write_features(path: Path, items: Iterable[tuple[str, Feature]]) -> None:
    """Writes (sample id, tensors) to `path`, under a temporary name of this process until it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with tarfile.open(temporary, "w") as tar:
            for key, feature in items:
                blob = save(feature)
                member = tarfile.TarInfo(f"{key}.safetensors")
                member.size = len(blob)
                tar.addfile(member, io.BytesIO(blob))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class FeatureStore:
    """The features of a ShardSet's `samples` rows, from one file a shard, in memory (half precision)."""

    def __init__(self, paths: Sequence[Path], samples: int) -> None:
        found: list[Feature] = []
        for path in paths:
            with tarfile.open(path) as tar:
                for member in tar:
                    stream = tar.extractfile(member)
                    assert stream is not None
                    found.append({key: value.half() for key, value in load(stream.read()).items()})
        assert len(found) == samples
        self._found = found
        self.width = found[0]["frames"].shape[1]
        self.text_width = found[0]["captions"].shape[1]

    def frames(self, row: int) -> NDArray[np.float32]:
        """(n, W)"""
        return self._found[row]["frames"].float().numpy()

    def __call__(self, captions: Sequence[Caption]) -> Tensor:
        return torch.stack([self._found[caption.row]["captions"][caption.number] for caption in captions]).float()

    def filler(self) -> Tensor:
        return torch.zeros(1, self.text_width)


def _stamp(path: Path) -> list[Any]:
    """A file's name, size and time (a folder's: those of its files); cheap, and it tells one that was replaced."""
    if path.is_dir():
        return [_stamp(file) for file in sorted(path.iterdir())]
    facts = path.stat()
    return [path.name, facts.st_size, facts.st_mtime_ns]
