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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from emcl.config import Config

Feature = dict[str, Tensor]
"""Of one sample: `frames` (n, W) and `captions` (c, W')."""


@dataclass(frozen=True)
class Origin:
    """The towers whose outputs are remembered."""

    architecture: Mapping[str, Any]
    """What JSON can hold of it; it may change under its name."""
    weights: Sequence[str | None]
    """Files or folders of pretrained weights, or names of some; None where there are none."""
    random: bool
    """Whether some weights are drawn by the seed."""


def fingerprint(config: Config, origin: Origin, shard: Path) -> str:
    """Of all that a shard's features depend on."""
    facts: dict[str, Any] = {
        "version": 4,
        "model": config.model.name,
        "architecture": dict(origin.architecture),
        "weights": [_stamp(Path(path)) if path and Path(path).exists() else path for path in origin.weights],
        "seed": config.seed if origin.random else None,
        "transform": [config.data.frames, config.data.fps, config.data.size, config.data.words, config.data.keyframes],
        "shard": _stamp(shard),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def feature_path(config: Config, origin: Origin, shard: Path) -> Path:
    return shard.parent / "features" / fingerprint(config, origin, shard) / shard.name


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


def read_features(path: Path) -> Iterator[Feature]:
    """What `write_features` wrote, in half precision."""
    with tarfile.open(path) as tar:
        for member in tar:
            stream = tar.extractfile(member)
            assert stream is not None
            yield {key: value.half() for key, value in load(stream.read()).items()}


def _stamp(path: Path) -> list[Any]:
    """A file's name, size and time (a folder's: those of its files); cheap, and it tells one that was replaced."""
    if path.is_dir():
        return [_stamp(file) for file in sorted(path.iterdir())]
    facts = path.stat()
    return [path.name, facts.st_size, facts.st_mtime_ns]
