"""Cached outputs of frozen towers: computed once, stored beside the shards, read by later runs and epochs.

For every shard there is a tar of `KEY.safetensors` with `frames` (n, W) and `captions` (c, W'), in a folder named by
a fingerprint of everything that they depend on: the towers, transform and the shard itself. Towers are known by their
weights and not by the settings that made them, since `--init` and exports bring weights that no setting tells.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from emcl.config import Config
from emcl.data.data_settings import DataConfig
from emcl.data.loader import Clips
from emcl.data.sampler import Draw
from emcl.data.samples import Sample
from emcl.data.split import Feature, Split
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.backbone import Backbone

TEXTS_AT_ONCE = 256
FRAMES_AT_ONCE = {"cpu": 8, "cuda": 256}
"""Few on a CPU, so that they stay in its cache: 157 frames/s by 8, 66 by 64 (EfficientNet-lite0 at 192 px, 2 cores)."""
VIDEOS_AT_ONCE = 32


def with_features(
    split: Split,
    config: Config,
    backbone: Backbone,
    ranks: Ranks,
    device: torch.device,
    *,
    towers: str | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Split:
    """The split with cached features, if they are configured; computes those that are missing.

    `backbone` must not be in a DeepSpeed engine yet. Called by all ranks, which share the shards' work; `progress`
    is called with every video.

    Args:
        towers: what `identify_towers` says of the backbone, where that is known.

    Raises:
        UserError: a clip does not decode.
    """
    if not config.model.cache_features:
        return split
    shards, towers = split.shards, towers or identify_towers(backbone, ranks)
    paths = feature_paths(split, config, towers)
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    missing = ranks.gather_objects(missing)[0]  # one list: another rank may look after the first has been written
    backbone.to(device).eval()
    error = None
    try:
        for number in missing[ranks.rank :: ranks.world_size]:
            rows = [row for row, item in enumerate(shards.rows) if item.shard == number]
            bar = tqdm(rows, desc=f"features of {paths[number].name}", unit="video", disable=not ranks.first)
            write_features(paths[number], _of_rows(bar, config, split, backbone, device, progress))
    except UserError as caught:
        error = caught
    ranks.agree(error)
    features = [feature for path in paths for feature in read_features(path)]
    assert len(features) == len(split)
    return replace(split, features=features)


@torch.no_grad()
def _of_rows(
    rows: tqdm[int],
    config: Config,
    split: Split,
    backbone: Backbone,
    device: torch.device,
    progress: Callable[[], None],
) -> Iterator[tuple[str, Feature]]:
    clips = Clips(split, config.data, training=False)
    group: list[tuple[Sample, Tensor]] = []
    for row in rows:
        loaded = clips[Draw(row, None, 0)]
        if loaded.frames is None:
            raise UserError(
                f"{loaded.bad[0]}: write the shards again without it (`emcl prepare` leaves out what does not decode)"
            )
        group.append((loaded.sample, torch.from_numpy(loaded.frames)))
        progress()
        if len(group) == VIDEOS_AT_ONCE:
            yield from _of_group(group, backbone, device)
            group = []
    yield from _of_group(group, backbone, device)


def _of_group(
    group: list[tuple[Sample, Tensor]], backbone: Backbone, device: torch.device
) -> Iterator[tuple[str, Feature]]:
    """Frames and captions of several videos go through the towers together."""
    if not group:
        return
    frames = torch.cat([frames for _, frames in group]).to(device)
    image = torch.cat(
        [
            backbone.image.trunk(backbone.preprocess(chunk).contiguous(memory_format=torch.channels_last)).cpu().half()
            for chunk in frames.split(FRAMES_AT_ONCE.get(device.type, 64))
        ]
    )
    captions = [caption for sample, _ in group for caption in sample.captions]
    text = torch.zeros(len(captions), backbone.text.width, dtype=torch.float16)
    by_length = sorted(range(len(captions)), key=lambda index: len(captions[index]))  # little padding
    for first in range(0, len(captions), TEXTS_AT_ONCE):
        chosen = by_length[first : first + TEXTS_AT_ONCE]
        tokens = backbone.tokenize([captions[index] for index in chosen])
        text[chosen] = backbone.text.trunk(tokens).cpu().half()
    of_video = image.split([len(frames) for _, frames in group])
    of_caption = text.split([len(sample.captions) for sample, _ in group])
    for (sample, _), frames, captions_ in zip(group, of_video, of_caption, strict=True):
        yield sample.id, {"frames": frames.clone(), "captions": captions_.clone()}


def identify_towers(backbone: Backbone, ranks: Ranks) -> str:
    """Hash of both trunks: their architecture and every weight. Called by all ranks; the first one's counts."""
    return str(ranks.gather_objects(hash_of_towers(backbone) if ranks.first else None)[0])


def hash_of_towers(backbone: Backbone) -> str:
    """Of one rank's."""
    architecture = {**backbone.architecture(backbone.config), "colours": backbone.normalisation}
    digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
    for tower in (backbone.image, backbone.text):
        for name, weight in tower.trunk.state_dict().items():
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def feature_paths(split: Split, config: Config, towers: str) -> list[Path]:
    """Where the features of each of the split's shards are, or will be."""
    return [
        shard.parent / "features" / _fingerprint(config, towers, shard) / shard.name for shard in split.shards.paths
    ]


def _fingerprint(config: Config, towers: str, shard: Path) -> str:
    """Hash of all that a shard's features depend on."""
    data, file = config.data, shard.stat()
    facts: dict[str, Any] = {
        "version": 5,
        "towers": towers,
        "transform": [data.frames, data.fps, data.image_size, data.max_tokens, data.keyframes, *_unusual(data)],
        "shard": [shard.name, file.st_size, file.st_mtime_ns],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _unusual(data: DataConfig) -> list[str]:
    """Choices that did not exist when features were first kept, where they are not the usual ones."""
    chosen = data.sampling, data.resize, data.resize_mode, data.interpolation
    return [value for value in chosen if value not in (None, "slices", "ffmpeg", "shortest", "bicubic")]


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
