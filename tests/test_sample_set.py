"""The generated sample set: reproducible to the byte, held-out combinations, real videos in which order matters."""

from __future__ import annotations

import io
from pathlib import Path

import av

from emcl.data.shards import open_shards
from emcl.prepare.sample_set import SPLITS, generate, plan


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(sample_shards: Path, tmp_path: Path) -> None:
    counts = {"train": 24, "val": 8, "test": 12}
    generate(tmp_path / "again", counts=counts, seed=1, shard_size=12, processes=2, progress=False)
    names = ["train-000000.tar", "train-000001.tar", "val-000000.tar", "test-000000.tar"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (sample_shards / name).read_bytes(), name
    generate(tmp_path / "other", counts={"train": 4, "val": 1, "test": 1}, seed=2, processes=1, progress=False)
    assert (tmp_path / "other" / "val-000000.tar").read_bytes() != (sample_shards / "val-000000.tar").read_bytes()


def test_test_and_val_combinations_are_never_seen_in_training() -> None:
    clips = plan(SPLITS, 0)
    of = {split: {clip.scene for clip in clips if clip.split == split} for split in SPLITS}
    assert {split: sum(clip.split == split for clip in clips) for split in SPLITS} == SPLITS
    assert SPLITS["train"] >= 2000 and SPLITS["val"] >= 200 and SPLITS["test"] >= 500
    assert not of["train"] & of["test"]
    assert not of["train"] & of["val"]
    assert not of["val"] & of["test"]
    assert len(of["test"]) == SPLITS["test"]  # each of them once


def test_clips_are_h264_of_two_to_four_seconds_with_captions_and_questions(sample_shards: Path) -> None:
    shards = open_shards(f"{sample_shards}/test-000000.tar")
    for row in shards.rows:
        with av.open(io.BytesIO(shards.read(row))) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264"
            assert min(stream.width, stream.height) >= 112
            assert 2 <= stream.frames / float(stream.average_rate) <= 4
        assert len(set(row.sample.captions)) == len(row.sample.captions) >= 3
        assert len(row.sample.qa) >= 4
        assert all(item["question"] and item["answer"] for item in row.sample.qa)
