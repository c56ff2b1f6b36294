"""Computes what frozen towers say of every sample, once; later runs and epochs read it (data/features.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from emcl.config import Config
from emcl.data.features import Feature, feature_path, write_features
from emcl.data.loader import Clips
from emcl.data.order import Draw
from emcl.data.samples import Sample
from emcl.data.split import Split
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.model.backbone import Backbone

TEXTS_AT_ONCE = 256
FRAMES_AT_ONCE = {"cpu": 8, "cuda": 256}
"""On a CPU few frames stay in its cache: 157 frames/s by 8, 66 by 64 (EfficientNet-lite0 at 192 px, 2 cores)."""
VIDEOS_AT_ONCE = 32


def with_features(
    split: Split,
    config: Config,
    backbone: Backbone,
    ranks: Ranks,
    device: torch.device,
    *,
    progress: Callable[[], None] = lambda: None,
) -> Split:
    """The split with remembered features, where the configuration wants them; computes those that are missing.

    `backbone` is one that no DeepSpeed engine holds yet. Called by all ranks, which share the shards' work; `progress`
    is called with every video.

    Raises:
        UserError: a clip does not decode.
    """
    if not config.model.cache_features:
        return split
    shards, origin = split.shards, backbone.origin(config.model)
    paths = [feature_path(config, origin, shard) for shard in shards.paths]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    missing = ranks.gather_objects(missing)[0]  # one list: another rank may look after the first has been written
    backbone.to(device).eval()
    error = None
    try:
        for number in missing[ranks.rank :: ranks.world_size]:
            rows = [row for row, item in enumerate(shards.rows) if item.shard == number]
            bar = tqdm(rows, desc=f"features of {paths[number].name}", unit="video", disable=not ranks.first)
            write_features(paths[number], _of_rows(bar, config, split, backbone, device, progress))
    except UserError as found:
        error = found
    ranks.agree(error)
    return split.with_features(paths)


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
            backbone.image.trunk(backbone.preprocess(part).contiguous(memory_format=torch.channels_last)).cpu().half()
            for part in frames.split(FRAMES_AT_ONCE.get(device.type, 64))
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
