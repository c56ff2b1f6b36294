"""Augmentation on the device: timm's own draws, and PIL's own pixels."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, rand_augment_transform

from conftest import SHARED
from emcl.data.augment import GEOMETRIC, Augmentation, Drawn, plan_of
from emcl.data.decode import decode
from emcl.data.image_ops import augment
from emcl.errors import UserError

STRINGS = (
    "rand-m7-n4-mstd0.5-inc1",
    "rand-m9-n2",
    "rand-m5-n3-p0.9-tweights",
    "rand-n3-mstd101-t3a",
    "rand-m6-n4-t3aw",
)
PIL_OP = {function.__name__: function for function in NAME_TO_OP.values()}
HEIGHT, WIDTH = 96, 128


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Of real clips where they are at hand, and of noise and flat colours, whose borders and histograms are extreme."""
    rng = np.random.default_rng(0)
    clips = [
        rng.integers(0, 256, (2, HEIGHT, WIDTH, 3), np.uint8),
        rng.integers(100, 140, (1, HEIGHT, WIDTH, 3), np.uint8),
        np.full((1, HEIGHT, WIDTH, 3), 77, np.uint8),
        np.broadcast_to((np.arange(WIDTH) * 2).astype(np.uint8)[None, None, :, None], (1, HEIGHT, WIDTH, 3)),
    ]
    for path in sorted((SHARED / "data/videos").glob("*.mp4"))[:3]:
        clips.append(decode(path.read_bytes(), frames=3, size=WIDTH)[:, :HEIGHT])
    return np.concatenate(clips)


def by_pil(frames: np.ndarray, op: Drawn) -> np.ndarray:
    arguments = () if op.kind in ("auto_contrast", "equalize", "invert") else (op.argument,)
    if op.kind in ("posterize", "solarize", "solarize_add"):
        arguments = tuple(map(int, arguments))
    how: dict[str, Any] = {"fillcolor": (128, 128, 128), "resample": Image.Resampling(3 if op.cubic else 2)}
    return np.stack([np.asarray(PIL_OP[op.kind](Image.fromarray(frame), *arguments, **how)) for frame in frames])


def ours(frames: np.ndarray, op: Drawn) -> np.ndarray:
    """Beside a clip of another length and an untouched one, which must not matter."""
    rest = frames[:2]
    plan = plan_of([[], [op], [op]], [2, 2, len(frames)], HEIGHT, WIDTH)
    return augment(torch.from_numpy(np.concatenate([rest, rest, frames])), plan)[4:].numpy()


POINTWISE = [
    *(Drawn(kind) for kind in ("auto_contrast", "equalize", "invert")),
    *(Drawn("posterize", bits) for bits in range(1, 9)),
    *(Drawn("solarize", level) for level in (0, 1, 77, 128, 255, 256)),
    *(Drawn("solarize_add", level) for level in (0, 33, 77, 110)),
    *(
        Drawn(kind, factor)
        for kind in ("brightness", "color", "contrast", "sharpness")
        for factor in (0.0, 0.1, 0.37, 0.73, 1.0, 1.27, 1.63, 1.9)
    ),
    *(Drawn("gaussian_blur", radius) for radius in (0.1, 0.6, 1.3, 2.0)),
]


@pytest.mark.parametrize("op", POINTWISE, ids=str)
def test_operations_without_resampling_are_pils_bit_for_bit(op: Drawn, frames: np.ndarray) -> None:
    np.testing.assert_array_equal(ours(frames, op), by_pil(frames, op))


@pytest.mark.parametrize("kind", GEOMETRIC)
@pytest.mark.parametrize("cubic", [False, True])
def test_resampled_ones_are_pils_but_for_1_in_few_pixels(kind: str, cubic: bool, frames: np.ndarray) -> None:
    """Between two pixels at a simple fraction of their distance, true values are often whole numbers, and PIL's sums
    fall just below them or not: there a few in a hundred differ, elsewhere a few in ten thousand."""
    arguments = (-30.0, -7.3, 0.0, 2.1, 21.0, 90.0) if kind == "rotate" else (-0.45, -0.20711, 0.0, 0.1, 0.31337)
    for argument in arguments:
        op = Drawn(kind, argument, cubic)
        apart = np.abs(ours(frames, op).astype(int) - by_pil(frames, op).astype(int))
        assert apart.max() <= 1, op
        assert apart.mean() < (0.05 if not cubic and argument in (-0.45, 0.1) else 0.002), op


@pytest.mark.parametrize("name", STRINGS)
def test_a_whole_draw_is_what_timm_itself_does_for_that_seed(name: str, frames: np.ndarray) -> None:
    transform = rand_augment_transform(name, {"translate_const": 100})
    augmentation = Augmentation(name)
    seeds = range(40)
    theirs = []
    for seed in seeds:
        random.seed(seed)
        np.random.seed(seed)
        theirs.append(np.asarray(transform(Image.fromarray(frames[-1]))))
    plan = augmentation.plan(seeds, [1] * len(seeds), HEIGHT, WIDTH)
    augmented = augment(torch.from_numpy(frames[-1:]).expand(len(seeds), -1, -1, -1), plan).numpy()
    exact = [bool((one == other).all()) for one, other in zip(augmented, theirs, strict=True)]
    resampled = [any(op.kind in GEOMETRIC for op in augmentation.draw(seed)) for seed in seeds]
    assert all(same or moved for same, moved in zip(exact, resampled, strict=True))
    # a later operation may make more of a difference of 1, in few pixels
    apart = np.abs(augmented.astype(int) - np.stack(theirs))
    assert apart.mean() < 0.05


def test_drawing_leaves_the_global_generators_as_they_were() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()
    Augmentation(STRINGS[0]).draw(7)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before


def test_a_clip_gets_the_same_pixels_in_any_company(frames: np.ndarray) -> None:
    augmentation = Augmentation(STRINGS[0])
    clips = [frames[:3], frames[1:4], frames[-5:], frames[-4:]]
    counts = [len(clip) for clip in clips]
    plan = augmentation.plan(range(4), counts, HEIGHT, WIDTH)
    together = augment(torch.from_numpy(np.concatenate(clips)), plan).split(counts)
    for seed, clip in enumerate(clips):
        alone = augment(torch.from_numpy(clip.copy()), augmentation.plan([seed], [len(clip)], HEIGHT, WIDTH))
        assert torch.equal(alone, together[seed])


@pytest.mark.parametrize("name", ["rand-m7-z4", "randaugment", "augmix-m5"])
def test_what_is_no_randaugment_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=name):
        Augmentation(name)


def test_posterize_to_no_bits_is_black(frames: np.ndarray) -> None:
    assert not ours(frames, Drawn("posterize", 0)).any()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_value_is_read_back_from_the_device(device: str) -> None:
    """Fake tensors have no values: whatever asked for one would raise."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    plans = [Augmentation(name).plan(range(32), [3] * 31 + [2], HEIGHT, WIDTH) for name in STRINGS]
    with FakeTensorMode():
        for plan in plans:
            numbers = torch.empty(plan["numbers"].shape, dtype=torch.float64, device=device)
            frames = torch.empty((95, HEIGHT, WIDTH, 3), dtype=torch.uint8, device=device)
            augmented = augment(frames, {**plan, "numbers": numbers})
            assert (augmented.shape, augmented.dtype, augmented.device.type) == (frames.shape, torch.uint8, device)
