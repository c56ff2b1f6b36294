"""Frames as EMCL-Net's code takes, resizes, augments and fills them, and pairs of one video as negatives."""

from __future__ import annotations

import dataclasses
import re
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

import emcl
from conftest import TINY, short_run, small
from emcl.cli import main
from emcl.config import fingerprint_text, resolve
from emcl.data.batch import videos_of
from emcl.data.data_settings import DataConfig
from emcl.data.decode import decode, decode_as, evenly
from emcl.data.frame_shapes import ByFFmpeg, ByPIL
from emcl.data.loader import Clips, training_loader
from emcl.data.rand_augment import seeded
from emcl.data.sampler import RankBatchSampler
from emcl.data.shards import open_shards
from emcl.data.split import open_split, open_training_split
from emcl.errors import UserError
from emcl.given_videos import frames_of_given
from emcl.model.backbone import Encoded, build_backbone
from emcl.model.feature_cache import feature_paths
from emcl.multitask import VideoLanguageModel
from emcl.prepare.writer import encode_mp4
from emcl.train.fake_step import build_on_meta
from emcl.train.flops import Flops
from emcl.train.plan import activation_bytes
from test_losses_on_ranks import global_batch, part_of

RAND_AUGMENT = "rand-m7-n4-mstd0.5-inc1"
RATE = 10
"""Frames a second of the video that tells its moments."""
STEP = 6
"""Levels of grey that a second adds."""


@pytest.fixture(scope="module")
def clock() -> bytes:
    """40 seconds, each of one grey level."""
    levels = np.repeat(np.arange(40, dtype=np.uint8) * STEP, RATE)
    return encode_mp4(np.ascontiguousarray(np.broadcast_to(levels[:, None, None, None], (400, 32, 32, 3))), RATE, crf=1)


def seconds_of(clock: bytes, **how: float) -> list[int]:
    frames = decode(clock, size=32, sampling="seconds", **{"frames": 100, "fps": 1.0, **how})  # type: ignore[arg-type]
    return [round(level / STEP) for level in frames[:, 16, 16, 0].astype(int)]


def test_one_frame_a_second_from_the_first_on(clock: bytes) -> None:
    assert seconds_of(clock) == list(range(40))
    assert seconds_of(clock, fps=0.5) == list(range(0, 40, 2))
    assert seconds_of(clock, fps=2.0, end=3.0) == [0, 0, 1, 1, 2, 2, 3], "the frame at the end of a part is in it"
    assert seconds_of(clock, end=31.0) == list(range(32)), "DiDeMo's seconds 0 to 31"
    assert seconds_of(clock, start=10.5, end=12.0) == [10, 11]
    assert seconds_of(clock, start=39.5) == [39]
    assert seconds_of(clock, end=400.0) == list(range(40))
    assert seconds_of(clock, end=0.2) == [0]


@pytest.mark.parametrize("form", ["mp4", "matroska", "mpegts"])
@pytest.mark.parametrize("offset", [0.0, 1.44, 1.64])
def test_a_frame_that_starts_at_the_very_time_is_the_one(form: str, offset: float, tmp_path: Path) -> None:
    """Frames of 1/25 s that tell their number, in files whose first one is shown at `offset`."""
    file = tmp_path / "numbers"
    with av.open(str(file), "w", format=form) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.codec_context.gop_size, stream.codec_context.bit_rate = 12, 4_000_000
        for number in range(250):
            bits = [255 * (number >> bit & 1) for bit in range(8)]
            pixels = np.repeat(np.array(bits, np.uint8), 8)[None, :, None].repeat(64, 0).repeat(3, 2)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = number + round(offset * 25), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())

    def numbers(**how: float) -> list[int]:
        frames = decode(file, size=64, frames=100, fps=1.0, sampling="seconds", **how)  # type: ignore[arg-type]
        return [sum(int(frame[32, 8 * bit + 4, 0] > 127) << bit for bit in range(8)) for frame in frames]

    assert numbers() == list(range(0, 250, 25))
    for first in (1, 9, 18, 36, 37, 110):
        start = first / 25
        assert numbers(start=start, end=start + 3) == [first, first + 25, first + 50, first + 75]
        assert numbers(start=start) == list(range(first, 250, 25))


def test_the_end_of_a_video_is_not_that_of_its_sound(tmp_path: Path) -> None:
    file = tmp_path / "sound.mkv"
    with av.open(str(file), "w") as container:
        picture, sound = container.add_stream("mpeg4", rate=10), container.add_stream("pcm_s16le", rate=8000)
        picture.width = picture.height = 32
        for number in range(40):
            image = np.full((32, 32, 3), number * 6, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 10)
            container.mux(picture.encode(frame))
        container.mux(picture.encode())
        for second in range(9):
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.sample_rate, silence.pts, silence.time_base = 8000, second * 8000, Fraction(1, 8000)
            container.mux(sound.encode(silence))
    assert len(decode(file, size=32, frames=100, fps=1.0, sampling="seconds")) == 4
    levels = decode(file, size=32, frames=4)[:, 16, 16, 0].astype(int)
    np.testing.assert_allclose(levels, [30, 90, 150, 210], atol=8)  # at 0.5, 1.5, 2.5 and 3.5 s


def test_a_kept_video_is_stored_as_it_was_downloaded(clock: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(clock)
    (tmp_path / "table.csv").write_text("file,caption,split\na.mp4,a clock,train\n")
    where = ["--videos", str(tmp_path), "--annotations", f"{tmp_path}/table.csv", "--out", f"{tmp_path}/shards"]
    assert main(["prepare", "folder", *where, "--keep"]) == 0
    shards = open_shards(f"{tmp_path}/shards/train-*.tar")
    assert shards.read(shards.rows[0]) == clock


@pytest.mark.parametrize("frames", [1, 2, 12, 39, 40, 41])
def test_of_more_seconds_than_frames_both_ends_are_taken(frames: int, clock: bytes) -> None:
    seconds = seconds_of(clock, frames=frames)
    assert seconds == sorted(set(seconds)) and len(seconds) == min(frames, 40)
    assert seconds[0] == 0 and (frames == 1 or seconds[-1] == 39)
    if frames == 12:
        assert seconds == np.linspace(0, 39, 12).astype(int).tolist()


def test_frames_that_are_given_are_chosen_in_the_same_way() -> None:
    assert evenly(12, 3, "seconds").tolist() == [0, 5, 11] and evenly(12, 3, "slices").tolist() == [2, 6, 10]


@pytest.mark.parametrize(("height", "width"), [(240, 320), (321, 183), (64, 64), (63, 500), (31, 47)])
@pytest.mark.parametrize("size", [32, 64])
def test_pil_resizes_and_crops_as_torchvision_does(height: int, width: int, size: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    ours = ByPIL(size)(av.VideoFrame.from_ndarray(pixels, format="rgb24"))
    resized = Resize(size, InterpolationMode.BICUBIC)(Image.fromarray(pixels))
    np.testing.assert_array_equal(ours, np.asarray(CenterCrop(size)(resized)))


def test_whole_frames_are_augmented_before_all_of_a_clip_alike() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 60, 90, 3), np.uint8)
    transform = rand_augment_transform(RAND_AUGMENT, {"translate_const": 100})
    ours, state = ByPIL(32, augment=RAND_AUGMENT), np.random.get_state()[1].copy()
    changed = 0
    for seed in range(8):
        for frame in pixels:
            with seeded(seed):
                whole = transform(Image.fromarray(frame))
            resized = CenterCrop(32)(Resize(32, InterpolationMode.BICUBIC)(whole))
            made = ours(av.VideoFrame.from_ndarray(frame, format="rgb24"), seed)
            np.testing.assert_array_equal(made, np.asarray(resized))
            changed += bool((made != ByPIL(32)(av.VideoFrame.from_ndarray(frame, format="rgb24"))).any())
    assert changed > 10
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_loaders_augment_whole_frames_in_training_alone_and_leave_the_device_nothing(sample_shards: Path) -> None:
    data = DataConfig(
        train=f"{sample_shards}/train-*.tar", frames=3, image_size=32, batch_size=4, workers=0, resize="pil",
        augment=RAND_AUGMENT, cache_gib=1.0,
    )  # fmt: skip
    split = open_training_split(data, 0)
    assert split.sampler is not None
    batches = RankBatchSampler(split.sampler, rank=0, world_size=1, accumulation=1, start=0, stop=1)
    (batch,) = training_loader(split, data, batches, {})
    assert batch.augmentation is None and batch.videos is not None
    clips = Clips(split, data, training=True)
    first, again, other = (clips.frames(3, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any(), "each epoch has its own draw, and no decoded frame is kept"
    plain = Clips(split, dataclasses.replace(data, augment="none"), training=True).frames(3, 1)
    np.testing.assert_array_equal(Clips(split, data, training=False).frames(3, 1), plain)
    wrong = dataclasses.replace(data, augment="rubbish")
    with pytest.raises(UserError, match=r"data\.augment=rubbish is neither `none` nor a timm RandAugment string$"):
        training_loader(split, wrong, batches, {})


def test_a_loaded_model_sees_frames_as_its_evaluation_did(sample_shards: Path, tmp_path: Path) -> None:
    published = ["data.sampling=seconds", "data.fps=1", "data.resize=pil", "data.frames=2", "model.absent_frames=grey"]
    model = emcl.load(short_run(sample_shards, tmp_path, *published))
    split = open_split(f"{sample_shards}/test-000000.tar")
    row = split.shards.rows[0]
    file = tmp_path / "clip.mp4"
    file.write_bytes(split.shards.read(row))
    clip = Clips(split, model.config.data, training=False).frames(0, 0)
    np.testing.assert_array_equal(frames_of_given(file, model.config.data), clip)
    assert len(clip) == 2 and (clip != decode_as(DataConfig(frames=2), file, shape=ByFFmpeg(32))).any()
    features = model.encode_video(file)
    assert model.encode_video(clip).frames.allclose(features.frames, atol=1e-5)


def test_absent_frames_are_grey_pictures_that_pass_the_tower() -> None:
    settings = [f"model.name={TINY}", "data.image_size=32", "data.frames=4", "data.max_tokens=16"]
    config = resolve(["retrieval"], overrides=[*settings, "model.absent_frames=grey"])
    torch.manual_seed(0)
    backbone = build_backbone(config)
    clips = [np.random.default_rng(n).integers(0, 256, (count, 32, 32, 3), np.uint8) for n, count in enumerate((2, 4))]
    videos = videos_of(clips, 4)
    encoded_BTD = backbone.encode_video(videos)

    pictures = torch.zeros(2, 4, 3, 32, 32)
    for row, clip in enumerate(clips):
        pictures[row, : len(clip)] = backbone.preprocess(torch.from_numpy(clip))
    each_BTD = backbone.image(pictures.flatten(0, 1)).view(2, 4, -1)
    assert backbone.temporal is not None
    torch.testing.assert_close(encoded_BTD, backbone.temporal(each_BTD, videos.mask_BT), atol=1e-5, rtol=1e-5)

    torch.manual_seed(0)
    without = build_backbone(resolve(["retrieval"], overrides=settings)).encode_video(videos)
    torch.testing.assert_close(without[videos.mask_BT], encoded_BTD[videos.mask_BT], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(without[0, 2:], encoded_BTD[0, 2:], atol=1e-2)


def test_one_grey_picture_a_batch_is_not_counted_as_one_of_each_video() -> None:
    settings = [f"model.name={TINY}", "data.image_size=32", "data.frames=4", "data.max_tokens=16"]
    without = resolve(["retrieval"], overrides=settings)
    grey = resolve(["retrieval"], overrides=[*settings, "model.absent_frames=grey"])
    assert Flops.of(grey) == Flops.of(without)
    kept = [activation_bytes(build_on_meta(config), config) for config in (grey, without)]
    assert kept[0] == kept[1] > 0


def test_pairs_of_one_video_are_negatives_where_asked() -> None:
    batch = part_of(global_batch(), slice(0, 8))
    losses = {}
    for asked in ("false", "true"):
        config = resolve(
            ["retrieval"],
            overrides=[
                f"model.name={TINY}", "data.image_size=32", "data.frames=3", "data.max_tokens=12",
                f"optim.same_video_negatives={asked}",
            ],
        )  # fmt: skip
        torch.manual_seed(0)
        model = VideoLanguageModel(config)
        encoded: Encoded = model.encode(batch)
        assert (encoded.video_B is None) == (asked == "true")
        losses[asked] = float(model(batch=batch)["retrieval/contrastive"].detach())
    assert losses["true"] > losses["false"] + 0.05, "more negatives"


def test_kept_features_know_how_frames_were_taken(sample_shards: Path) -> None:
    def folder(*settings: str) -> str:
        split = open_split(f"{sample_shards}/val-000000.tar")
        config = resolve(["retrieval"], overrides=[*small(sample_shards), *settings])
        return feature_paths(split, config, "towers")[0].parent.name

    names = {
        folder(), folder("data.resize=pil"), folder("data.fps=1"), folder("data.sampling=seconds", "data.fps=1"),
        folder("data.sampling=seconds", "data.fps=1", "data.resize=pil"),
    }  # fmt: skip
    assert len(names) == 5


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.sampling=seconds"], "data.sampling=seconds wants data.fps"),
        (["data.sampling=seconds", "data.fps=1", "data.jitter=true"], "excludes data.jitter and data.keyframes"),
        (["data.sampling=seconds", "data.fps=1", "data.keyframes=true"], "excludes data.jitter and data.keyframes"),
        (
            ["model.frozen=[image,text]", "model.cache_features=true", "model.absent_frames=grey"],
            "model.cache_features=true excludes model.absent_frames=grey",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        resolve(["retrieval"], overrides=settings)


def test_an_index_knows_its_model_as_before() -> None:
    usual = fingerprint_text(resolve(["retrieval"]))
    assert not any(word in usual for word in ("sampling", "resize", "same_video", "absent"))
    other = resolve(["retrieval"], overrides=["data.sampling=seconds", "data.fps=1"])
    assert "sampling: seconds" in fingerprint_text(other)
