"""Outputs of frozen towers, computed once: they are what the towers say, and stale ones are not used."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from conftest import TINY
from emcl.config import Config, resolve
from emcl.data.captions import every_caption
from emcl.data.loader import Clips
from emcl.data.sampler import Draw
from emcl.data.split import open_split
from emcl.distributed import ALONE
from emcl.errors import UserError
from emcl.model.backbone import build_backbone, tokenizer_of
from emcl.model.feature_cache import feature_path, with_features
from emcl.model.open_clip_backbone import OpenClipBackbone, tokenizer

SETTINGS = [f"model.name={TINY}", "model.frozen=[image,text]", "model.cache_features=true", "data.generate=false"]
CPU = torch.device("cpu")


def path_of(config: Config, shard: Path) -> Path:
    return feature_path(config, OpenClipBackbone.origin(config.model), shard)


def settings(*more: str) -> Config:
    return resolve(
        ["retrieval"], overrides=[*SETTINGS, "data.image_size=32", "data.frames=3", "data.max_tokens=16", *more]
    )


def test_features_are_what_the_towers_say(sample_shards: Path, tmp_path: Path) -> None:
    shard = tmp_path / "val-000000.tar"  # features are written beside it, and other tests read `sample_shards`
    shard.write_bytes((sample_shards / shard.name).read_bytes())
    config = settings()
    torch.manual_seed(0)
    backbone = build_backbone(config).eval()
    split = open_split(str(shard), tokenizer_of(config))
    kept = with_features(split, config, backbone, ALONE, CPU)
    assert path_of(config, shard).is_file()

    clips = Clips(split, config.data, training=False)
    tokenize = tokenizer(TINY, 16)
    draws = [Draw(row, None, 0) for row in range(len(split))]
    pictures, sentences = [], []
    with torch.no_grad():
        for draw in draws:
            loaded = clips[draw]
            assert loaded.frames is not None
            pictures.append(backbone.image.trunk(backbone.preprocess(torch.from_numpy(loaded.frames))))
            sentences.append(backbone.text.trunk(tokenize(loaded.sample.captions)))
    # all videos at once, so that a failure shows whether one differs, or all
    remembered = [torch.from_numpy(kept.remembered_frames(draw.row)) for draw in draws]
    torch.testing.assert_close(torch.stack(remembered), torch.stack(pictures), atol=2e-3, rtol=2e-3)
    captions = [caption for draw in draws for caption in every_caption(split.sample(draw.row), draw)]
    torch.testing.assert_close(kept.text(captions), torch.cat(sentences), atol=2e-3, rtol=2e-3)


def test_another_model_size_or_shard_never_finds_them(sample_shards: Path, tmp_path: Path) -> None:
    shard = tmp_path / "val-000000.tar"
    shard.write_bytes((sample_shards / "val-000000.tar").read_bytes())
    own_path = path_of(settings(), shard)
    for other in (
        "data.image_size=48",
        "data.frames=2",
        "data.max_tokens=12",
        "data.fps=1.0",
        "model.name=tiny",
        "seed=1",
    ):
        assert path_of(settings(other), shard) != own_path, other
    assert path_of(settings("optim.lr=1", "emcl.bases=4"), shard) == own_path
    json_file = tmp_path / "own.json"
    json_file.write_text(Path(TINY).read_text())
    own = settings(f"model.name={json_file}")
    before = path_of(own, shard)
    json_file.write_text(Path(TINY).read_text().replace('"layers": 1', '"layers": 2'))
    assert path_of(own, shard) != before
    pretrained = f"model.pretrained={tmp_path}/towers.safetensors"  # nothing of those towers is drawn at random
    assert path_of(settings(pretrained, "seed=1"), shard) == path_of(settings(pretrained), shard) != own_path
    os.utime(shard, ns=(1, 1))  # written again
    assert path_of(settings(), shard) != own_path


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.frozen=[image]", "model.frozen"),
        ("data.jitter=true", "data.jitter"),
        ("data.augment=rand-m7-n4", "augment"),
    ],
)
def test_features_that_would_not_last_are_refused(override: str, named: str) -> None:
    with pytest.raises(UserError, match=f"^model.cache_features=true .*{named}"):
        settings(override)
