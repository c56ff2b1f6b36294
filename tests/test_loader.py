"""Batches from real tars of real MP4: independent of workers, short videos masked, broken clips replaced and named."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SHARED
from emcl.data.batch import Batch
from emcl.data.data_settings import DataConfig
from emcl.data.decode import DecodeError, decode
from emcl.data.image_ops import augmented
from emcl.data.loader import evaluation_loader, training_loader
from emcl.data.resilient_loader import ResilientLoader
from emcl.data.sampler import RankBatchSampler, ShardSampler
from emcl.data.shards import find_shards, open_shards
from emcl.data.split import Split, open_split
from emcl.errors import OneRankError, UserError
from emcl.prepare.writer import encode_mp4

DATA = DataConfig(frames=4, image_size=32, batch_size=6, workers=0)


def ids(samples: Any, draws: Any) -> list[str]:
    return [sample.id for sample in samples]


def batches(split: Split, data: DataConfig, steps: int = 4, rank: int = 0, world_size: int = 1) -> list[Batch]:
    sampler = ShardSampler(lengths=tuple(split.shards.lengths), texts=None, batch_size=6, buffer=8, seed=0)
    rank_sampler = RankBatchSampler(sampler, rank=rank, world_size=world_size, accumulation=1, start=0, stop=steps)
    return [augmented(batch) for batch in training_loader(split, data, rank_sampler, {"ids": ids})]


@pytest.mark.parametrize("settings", [{}, {"jitter": True}, {"augment": "rand-m7-n4-mstd0.5-inc1"}])
def test_workers_and_ranks_do_not_change_a_batch(settings: dict[str, Any], sample_shards: Path) -> None:
    split = open_split(f"{sample_shards}/train-*.tar")
    data = replace(DATA, **settings)
    alone = batches(split, data)
    for other in (batches(split, replace(data, workers=2)), batches(split, replace(data, cache_gib=0.1))):
        for one, two in zip(alone, other, strict=True):
            assert one.ids == two.ids
            torch.testing.assert_close(one.videos.frames, two.videos.frames, rtol=0, atol=0)
    halves = [batches(split, data, rank=rank, world_size=2) for rank in range(2)]
    for step, whole in enumerate(alone):
        assert halves[0][step].ids + halves[1][step].ids == whole.ids
        torch.testing.assert_close(
            torch.cat([half[step].videos.frames for half in halves]), whole.videos.frames, rtol=0, atol=0
        )


def test_jitter_and_augmentation_change_from_epoch_to_epoch(sample_shards: Path) -> None:
    split = open_split(f"{sample_shards}/train-000000.tar")  # 12 clips: two steps an epoch
    frames_of = {}
    for batch in batches(split, replace(DATA, jitter=True), steps=4):
        for name, frames in zip(batch.ids, batch.videos.frames.split(4), strict=True):
            frames_of.setdefault(name, []).append(frames)
    assert all(not torch.equal(*twice) for twice in frames_of.values())


def test_training_frames_are_augmented_by_their_clips_seeds_and_evaluations_never(sample_shards: Path) -> None:
    split = open_split(f"{sample_shards}/train-000000.tar")
    plain = batches(split, DATA, steps=2)
    data = replace(DATA, augment="rand-m7-n4-mstd0.5-inc1")
    for one, other in zip(plain, batches(split, data, steps=2), strict=True):
        assert one.ids == other.ids
        assert not torch.equal(one.videos.frames, other.videos.frames)
        assert one.videos.frames.shape == other.videos.frames.shape and other.videos.frames.dtype == torch.uint8
        assert other.augmentation is None, "what is done is not done twice"
    assert not any(
        batch.augmentation for batch in evaluation_loader(split, data, {}, batch_size=4, rank=0, world_size=1)
    )


def test_evaluation_takes_every_sample_exactly_once_over_the_ranks(sample_shards: Path) -> None:
    split = open_split(f"{sample_shards}/test-000000.tar")
    seen = [
        row
        for rank in range(3)
        for batch in evaluation_loader(split, DATA, {}, batch_size=3, rank=rank, world_size=3)
        for row in batch.rows
    ]
    assert sorted(seen) == list(range(12))


def broken(sample_shards: Path, tmp_path: Path, share: int) -> Split:
    """The first shard with every `share`-th video cut to nonsense."""
    with tarfile.open(sample_shards / "train-000000.tar") as source, tarfile.open(tmp_path / "b.tar", "w") as out:
        for number, member in enumerate(source):
            content = source.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith("mp4") and number // 2 % share == 0:
                content = content[:100]
            info = tarfile.TarInfo(member.name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return open_split(str(tmp_path / "b.tar"))


def test_a_broken_clip_is_replaced_and_named(sample_shards: Path, tmp_path: Path) -> None:
    split = broken(sample_shards, tmp_path, 4)
    named = []
    for batch in batches(split, DATA, steps=2):
        assert len(batch.ids) == 6
        named += batch.bad
    assert len(named) == 3
    assert all("b.tar" in item for item in named)


def test_a_batch_for_which_no_clip_is_left_ends_the_run_with_names(sample_shards: Path, tmp_path: Path) -> None:
    split = broken(sample_shards, tmp_path, 1)
    sampler = ShardSampler(lengths=tuple(split.shards.lengths), texts=None, batch_size=6, buffer=8, seed=0)
    rank_sampler = RankBatchSampler(sampler, rank=0, world_size=1, accumulation=1, start=0, stop=1)
    with pytest.raises(OneRankError, match=r"rank 0, step 1: no clip decodes among .* after it: train\w+ in"):
        next(ResilientLoader(split, DATA, rank_sampler, {}).steps(0))


def test_evaluation_leaves_a_broken_clip_out_and_names_it(sample_shards: Path, tmp_path: Path) -> None:
    split = broken(sample_shards, tmp_path, 6)
    loaded = list(evaluation_loader(split, DATA, {}, batch_size=4, rank=0, world_size=1))
    assert sum(len(batch.ids) for batch in loaded) == 10
    assert sum(len(batch.bad) for batch in loaded) == 2


def test_frames_are_those_shown_at_the_middle_of_equal_slices(tmp_path: Path) -> None:
    from emcl.prepare.writer import encode_mp4

    levels = np.repeat(np.arange(10, 250, 20, dtype=np.uint8), 10)  # twelve levels of one second each
    video = np.broadcast_to(levels[:, None, None, None], (120, 64, 64, 3))
    encoded = encode_mp4(np.ascontiguousarray(video), 10, crf=1)
    brightness = decode(encoded, frames=6, size=32)[:, 16, 16, 0].astype(int)
    np.testing.assert_allclose(brightness, [30, 70, 110, 150, 190, 230], atol=6)  # seconds 1, 3, 5, ...
    of_span = decode(encoded, frames=2, size=32, start=6.0, end=10.0)[:, 16, 16, 0].astype(int)
    np.testing.assert_allclose(of_span, [150, 190], atol=6)  # seconds 7 and 9
    assert len(decode(encoded, frames=20, size=32, fps=1.0)) == 12
    with pytest.raises(DecodeError, match="outside"):
        decode(encoded, frames=2, size=32, start=99.0)


def test_shards_by_braces_glob_folder_and_list(sample_shards: Path) -> None:
    first = sample_shards / "train-000000.tar"
    assert find_shards(f"{sample_shards}/train-{{000000..000001}}.tar") == [first, sample_shards / "train-000001.tar"]
    assert find_shards(f"{sample_shards}/train-00000[01].tar")[0] == first
    assert first in find_shards(str(sample_shards))
    assert find_shards(f"{first}::{first}") == [first, first]
    with pytest.raises(UserError, match=r"train-000009.tar is missing"):
        find_shards(f"{sample_shards}/train-{{000000..000001}}.tar::{sample_shards}/train-{{000001,000009}}.tar")


def test_a_pickle_in_a_shard_is_never_touched(sample_shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "evil.tar"
    with tarfile.open(sample_shards / "val-000000.tar") as source, tarfile.open(path, "w") as out:
        for member in list(source)[:2]:
            out.addfile(member, source.extractfile(member))
        stem = out.getnames()[0].partition(".")[0]
        for ending in ("pickle", "pyd", "pth"):
            info = tarfile.TarInfo(f"{stem}.{ending}")
            content = b"cposix\nsystem\n(S'touch executed'\ntR."
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    shards = open_shards(str(path))
    assert len(shards) == 1
    assert not Path("executed").exists()
    assert json.loads(shards.rows[0].sample.to_json())["split"] == "val"


def test_swapped_videos_are_everybody_elses_and_each_is_shown_once(sample_shards: Path) -> None:
    split = open_split(f"{sample_shards}/val-000000.tar")
    loads = [
        evaluation_loader(split, DATA, {}, batch_size=3, rank=0, world_size=1, swap_seed=seed) for seed in (None, 0)
    ]
    own, swapped = (list(loader) for loader in loads)
    assert [batch.ids for batch in own] == [batch.ids for batch in swapped]

    def clips(batches: list[Batch]) -> list[bytes]:
        return [clip.numpy().tobytes() for batch in batches for clip in batch.videos.frames.split(DATA.frames)]

    assert not any(one == other for one, other in zip(clips(own), clips(swapped), strict=True))
    assert sorted(clips(own)) == sorted(clips(swapped))


def test_decoding_only_what_is_needed_changes_no_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    from emcl.data import decode as module

    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 64, 64, 3))
    videos = [encode_mp4(np.ascontiguousarray(ramp), rate, crf=20) for rate in (5, 25)]
    if (SHARED / "data/videos").is_dir():
        videos += [path.read_bytes() for path in sorted((SHARED / "data/videos").glob("*.[am][vp][i4]"))]

    def every_way() -> list[np.ndarray]:
        whole = [decode(video, frames=count, size=32) for video in videos for count in (1, 4, 12)]
        return whole + [decode(video, frames=2, size=32, start=3.0) for video in videos]

    chosen = every_way()
    used: list[int] = []

    def in_sequence(stream: Any, packets: Any, times: Any, _begins: Any) -> Any:
        used.append(len(packets))
        return module._in_sequence(stream, packets, times)

    monkeypatch.setattr(module, "_chosen", in_sequence)
    for one, other in zip(chosen, every_way(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert used


def test_a_video_without_times_of_showing_is_decoded_in_sequence(tmp_path: Path) -> None:
    """Motion JPEG in AVI, and H.264 whose packets carry no time of their own."""
    import av

    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuvj420p"
        for level in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * level, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuvj420p")))
        container.mux(stream.encode())
    levels = decode(path, frames=4, size=32)[:, 16, 16, 0].astype(int)
    np.testing.assert_allclose(levels, [20, 70, 120, 170], atol=12)


def test_key_frames_are_taken_within_their_slices_and_the_middle_where_there_is_none(tmp_path: Path) -> None:
    """Eighty frames, told apart by their brightness; every eighth is a key frame."""
    numbers = np.arange(80, dtype=np.uint8)[:, None, None, None] * 3
    video = encode_mp4(np.broadcast_to(numbers, (80, 64, 64, 3)), 8, crf=10, key_every=8)
    number_of = {frame.tobytes(): number for number, frame in enumerate(decode(video, frames=80, size=32))}
    assert len(number_of) == 80

    def shown(frames: int, **how: Any) -> list[int]:
        return [number_of[frame.tobytes()] for frame in decode(video, frames=frames, size=32, **how)]

    assert shown(20) == list(range(2, 80, 4))
    assert shown(10, keyframes=True) == list(range(0, 80, 8))
    # slices of four frames: every other one begins with a key frame
    assert shown(20, keyframes=True) == [number - 2 if number % 8 == 2 else number for number in range(2, 80, 4)]
    assert shown(2, start=1.25, end=5.25, keyframes=True) == [16, 32]
    assert shown(3, start=1.25, end=1.75, keyframes=True) == shown(3, start=1.25, end=1.75)
