"""Outputs of frozen towers, computed once: they are what the towers say, and stale ones are not used."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file

from conftest import TINY, launch, losses, recorded, small
from emcl.config import Config, resolve
from emcl.data.captions import every_caption
from emcl.data.loader import Clips
from emcl.data.sampler import Draw
from emcl.data.split import open_split
from emcl.distributed import ALONE
from emcl.errors import UserError
from emcl.model.backbone import Backbone, build_backbone, tokenizer_of
from emcl.model.feature_cache import feature_paths, identify_towers, with_features
from emcl.run_folder import checkpoints_in
from emcl.train.export import open_export

SETTINGS = [f"model.name={TINY}", "model.frozen=[image,text]", "model.cache_features=true", "data.generate=false"]
CPU = torch.device("cpu")


def path_of(config: Config, shard: Path, backbone: Backbone | None = None) -> Path:
    """Where the features are of a backbone, by default as the seed or the file of weights makes it."""
    torch.manual_seed(config.seed)
    towers = identify_towers(backbone or build_backbone(config), ALONE)
    (path,) = feature_paths(open_split(str(shard)), config, towers)
    return path


def settings(*more: str) -> Config:
    return resolve(
        ["retrieval"], overrides=[*SETTINGS, "data.image_size=32", "data.frames=3", "data.max_tokens=16", *more]
    )


@pytest.fixture
def shard(sample_shards: Path, tmp_path: Path) -> Path:
    """Eight clips; features are written beside it."""
    return Path(shutil.copy(sample_shards / "val-000000.tar", tmp_path))


def test_features_are_what_the_towers_say(shard: Path) -> None:
    config = settings()
    torch.manual_seed(0)
    backbone = build_backbone(config).eval()
    split = open_split(str(shard), tokenizer_of(config))
    kept = with_features(split, config, backbone, ALONE, CPU)
    assert path_of(config, shard).is_file()

    clips = Clips(split, config.data, training=False)
    tokenize = tokenizer_of(config)
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


def test_another_model_size_or_shard_never_finds_them(shard: Path, tmp_path: Path) -> None:
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
    weights = open_clip.model.CLIP(**json.loads(Path(TINY).read_text())).state_dict()
    torch.save(weights, tmp_path / "clip.pt")
    pretrained = f"model.pretrained={tmp_path}/clip.pt"  # nothing of those towers is drawn at random
    by_file = path_of(settings(pretrained), shard)
    assert path_of(settings(pretrained, "seed=1"), shard) == by_file != own_path
    assert path_of(settings(pretrained, "model.quick_gelu=true"), shard) != by_file
    weights["visual.class_embedding"][0] += 1e-6  # less than a step at CLIP's rate
    torch.save(weights, tmp_path / "clip.pt")
    assert path_of(settings(pretrained), shard) != by_file
    os.utime(shard, ns=(1, 1))  # written again
    assert path_of(settings(), shard) != own_path


def test_towers_with_weights_that_no_setting_tells_have_features_of_their_own(shard: Path) -> None:
    config, split = settings(), open_split(str(shard), tokenizer_of(settings()))
    of_each = []
    for number in range(2):
        torch.manual_seed(number)  # as `--init` or an export would bring them
        backbone = build_backbone(config)
        kept = with_features(split, config, backbone, ALONE, CPU)
        assert path_of(config, shard, backbone).is_file()
        of_each.append(torch.from_numpy(kept.remembered_frames(0)))
    assert (of_each[0] - of_each[1]).abs().max() > 0.1


@pytest.fixture(scope="module")
def begun(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run whose towers no other run's seed gives."""
    cwd = tmp_path_factory.mktemp("begun")
    short = [*small(sample_shards), "data.val=null", "data.test=null", "optim.max_steps=1", "seed=5", "name=begun"]
    done = launch("--task", "retrieval", *short, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd


@pytest.mark.xdist_group("features")
@pytest.mark.parametrize(("stage", "precision", "lost"), [(1, "fp32", True), (3, "fp32", True), (1, "bf16", False)])
def test_a_resumed_run_has_the_features_of_the_towers_that_it_began_with(
    stage: int, precision: str, lost: bool, begun: Path, sample_shards: Path, tmp_path: Path
) -> None:
    """Another run's, which the resumed one is not told of. Its checkpoint has them, in bf16 with fewer bits."""
    shards = tmp_path / "shards"
    shutil.copytree(sample_shards, shards, ignore=shutil.ignore_patterns("features"))
    run, features = tmp_path / "runs/run", shards / "features"
    short = [*small(shards), *SETTINGS[1:3], "data.val=null", "optim.max_steps=6", "name=run", f"precision={precision}"]
    start = ["--init", str(begun / "runs/begun"), *recorded(tmp_path), f"deepspeed=deepspeed/zero{stage}.json"]
    done = launch("--task", "retrieval", *short, *start, "checkpoint.every_steps=3", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    whole, weights = losses(tmp_path), load_file(run / "best/model.safetensors")
    written = {path.relative_to(features): path.read_bytes() for path in features.rglob("*.tar")}
    first, _ = open_export(begun / "runs/begun/best")
    for name in ("train-000000.tar", "train-000001.tar"):
        assert path_of(settings(), shards / name, first.backbone).relative_to(features) in written
    if lost:
        shutil.rmtree(features)
    shutil.rmtree(checkpoints_in(run / "checkpoints")[-1])
    where = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/again.db"}
    done = launch("--resume", "runs/run", *recorded(tmp_path, "again.db"), cwd=tmp_path, ranks=2, env=where)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.relative_to(features): path.read_bytes() for path in features.rglob("*.tar")} == written
    again = losses(tmp_path, "again.db")
    assert again == {step: whole[step] for step in (4, 5, 6)}
    for name, value in load_file(run / "best/model.safetensors").items():
        assert torch.equal(value, weights[name]), name


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
