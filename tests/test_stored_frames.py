"""`emcl prepare --store jpeg|raw`: frames of the training's size, read as any video is, and never trusted more."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from emcl.cli import main
from emcl.data.data_settings import DataConfig
from emcl.data.decode import DecodeError, codec, decode, resampled
from emcl.data.frame_shapes import ByFFmpeg, Frames
from emcl.data.loader import evaluation_loader
from emcl.data.samples import Sample
from emcl.data.shards import ShardSet, open_shards
from emcl.data.split import open_split
from emcl.prepare.videos import as_frames
from emcl.prepare.writer import encode_mov, write_shard

SIZE = 33
"""Odd, which a container may pad."""


@pytest.fixture
def video(sample_shards: Path) -> bytes:
    shards = open_shards(f"{sample_shards}/val-000000.tar")
    return shards.read(shards.rows[0])


def prepared(sample_shards: Path, tmp_path: Path, *more: str) -> ShardSet:
    """Two clips, the second a part of the first's video."""
    shards = open_shards(f"{sample_shards}/val-000000.tar")
    (tmp_path / "videos").mkdir(exist_ok=True)
    (tmp_path / "videos" / "a.mp4").write_bytes(shards.read(shards.rows[0]))
    (tmp_path / "a.csv").write_text("file,caption,start,end\na.mp4,whole,,\na.mp4,part,1,2\n")
    folder = ["--videos", str(tmp_path / "videos"), "--annotations", str(tmp_path / "a.csv")]
    assert main(["prepare", "folder", *folder, "--out", str(tmp_path / "out"), "--size", str(SIZE), *more]) == 0
    return open_shards(str(tmp_path / "out"))


def of_source(video: bytes, rate: int, start: float | None = None, end: float | None = None) -> Frames:
    return np.stack([ByFFmpeg(SIZE)(frame) for frame in resampled(video, Fraction(rate), start=start, end=end)])


def test_raw_frames_are_those_of_the_video_bit_for_bit(sample_shards: Path, tmp_path: Path, video: bytes) -> None:
    shards = prepared(sample_shards, tmp_path, "--store", "raw", "--fps", "4")
    for row, span in zip(shards.rows, ((None, None), (1.0, 2.0)), strict=True):
        theirs = of_source(video, 4, *span)
        stored = shards.read(row)
        np.testing.assert_array_equal(decode(stored, frames=len(theirs), size=SIZE), theirs)
        assert (row.sample.start, row.sample.end) == (None, None)
        assert len(stored) < len(theirs) * SIZE * (SIZE + 1) * 3 + 2000


def test_jpeg_frames_are_near_them_and_nearer_by_quality(sample_shards: Path, tmp_path: Path, video: bytes) -> None:
    (tmp_path / "fine").mkdir()
    (tmp_path / "coarse").mkdir()
    fine = prepared(sample_shards, tmp_path / "fine", "--store", "jpeg", "--quality", "95")
    coarse = prepared(sample_shards, tmp_path / "coarse", "--store", "jpeg", "--quality", "30")
    theirs = of_source(video, 3).astype(float)
    sizes, errors = [], []
    for shards in (fine, coarse):
        stored = shards.read(shards.rows[0])
        sizes.append(len(stored))
        decoded = decode(stored, frames=len(theirs), size=SIZE)
        errors.append(np.abs(decoded - theirs).mean())
        # FFmpeg cuts colours where it might round them; a wrong range of colours would be a dozen levels off
        assert abs((decoded - theirs).mean()) < 2, "a range of colours is taken for another"
    assert errors[0] < 8 and errors[0] < errors[1] and sizes[0] > sizes[1]


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_frames_are_chosen_by_time_as_of_any_video(store: str) -> None:
    """Forty frames at 10 a second, told apart by their brightness."""
    numbers = np.arange(40, dtype=np.uint8)[:, None, None, None] * 6
    stored = encode_mov(np.broadcast_to(numbers, (40, 32, 32, 3)), 10, quality=None if store == "raw" else 95)

    def shown(frames: int, **how: object) -> list[int]:
        decoded = decode(stored, frames=frames, size=32, **how)  # type: ignore[arg-type]
        return [round(float(frame.mean()) / 6) for frame in decoded]

    assert shown(40) == list(range(40))
    assert shown(4) == [5, 15, 25, 35]
    assert shown(2, start=2.0, end=4.0) == [25, 35]
    assert shown(12, fps=1.0) == [5, 15, 25, 35]
    assert shown(4, keyframes=True) == [5, 15, 25, 35], "every frame is a key frame"
    moved = shown(4, jitter=np.random.default_rng(0))
    assert moved == shown(4, jitter=np.random.default_rng(0)) != [5, 15, 25, 35]
    assert [number // 10 for number in moved] == [0, 1, 2, 3]
    assert decode(stored, frames=3, size=16).shape == (3, 16, 16, 3)


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_shards_are_the_same_bytes_again_and_verified_and_unpacked(
    store: str, sample_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = prepared(sample_shards, tmp_path, "--store", store)
    again = tmp_path / "again"
    again.mkdir()
    other = prepared(sample_shards, again, "--store", store)
    assert [path.read_bytes() for path in shards.paths] == [path.read_bytes() for path in other.paths]
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    quality = {"quality": 90} if store == "jpeg" else {}
    assert index["encoding"] == {"store": store, "size": SIZE, "fps": 3.0, **quality}
    assert main(["verify", str(tmp_path / "out"), "--decode"]) == 0
    assert main(["unpack", str(tmp_path / "out"), "--out", str(tmp_path / "files")]) == 0
    files = sorted((tmp_path / "files").glob("*.mov"))
    assert len(files) == 2
    assert {codec(file) for file in files} == {"rawvideo" if store == "raw" else "mjpeg"}


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_damaged_and_hostile_ones_are_broken_clips(store: str, tmp_path: Path, video: bytes) -> None:
    whole = as_frames(video, size=SIZE, fps=3.0, quality=None if store == "raw" else 90)
    huge = whole.replace(SIZE.to_bytes(2, "big") * 2, b"\xff\xff" * 2)  # the width and height that the file says
    assert huge != whole
    odd = {"empty": b"", "cut": whole[: len(whole) // 2], "huge": huge, "without": whole[: whole.index(b"moov") - 4]}
    for content in odd.values():
        with pytest.raises(DecodeError):
            decode(content, frames=2, size=SIZE)
    samples = [(Sample(id=name, captions=["x"]), "mov", content) for name, content in odd.items()]
    write_shard(tmp_path / "odd.tar", [*samples, (Sample(id="whole", captions=["x"]), "mov", whole)])
    data = DataConfig(frames=2, image_size=SIZE, workers=0)
    (batch,) = evaluation_loader(open_split(str(tmp_path / "odd.tar")), data, {}, batch_size=8, rank=0, world_size=1)
    assert batch.ids == ["whole"]
    assert [line.split()[0] for line in batch.bad] == ["empty", "cut", "huge", "without"]


@pytest.mark.parametrize("store", ["raw", "jpeg"])
def test_any_damage_gives_frames_of_the_right_shape_or_a_decode_error(store: str, video: bytes) -> None:
    whole = as_frames(video, size=SIZE, fps=3.0, quality=None if store == "raw" else 90)
    tables = whole.index(b"moov")
    rng = np.random.default_rng(0)
    for number in range(300):
        content = np.frombuffer(whole, np.uint8).copy()
        # mostly the tables: where samples lie, how long they are, what size they have
        positions = rng.integers(tables if number % 3 else 0, len(whole), 1 + number % 4)
        content[positions] = rng.integers(0, 256, len(positions))
        try:
            decoded = decode(content.tobytes(), frames=3, size=SIZE)
        except DecodeError:
            continue
        assert decoded.shape[1:] == (SIZE, SIZE, 3) and decoded.dtype == np.uint8


def test_videos_as_they_are_and_raw_frames_at_once_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text("file,caption\na.mp4,x\n")
    (tmp_path / "a.mp4").write_bytes(b"x")
    where = ["--videos", str(tmp_path), "--annotations", str(tmp_path / "a.csv"), "--out", str(tmp_path / "out")]
    assert main(["prepare", "folder", *where, "--store", "raw", "--keep"]) == 2
    assert "--keep" in capsys.readouterr().err
