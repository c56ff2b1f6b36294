"""Renders a scene as video frames: a textured background, moving shapes with soft edges, camera noise and shake."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emcl.prepare.scenes import Scene, Thing

Array = NDArray[Any]

SIDE = 112
FPS = 12
MARGIN = 8
"""Largest camera shake in pixels."""
RGB = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (40, 70, 225),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "cyan": (60, 210, 220),
}
RADIUS = {"small": 0.15, "large": 0.27, None: 0.2}
"""Fraction of the frame side; varied randomly by up to 10% either way."""


def render(scene: Scene, background: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Renders 2 to 4 seconds at FPS: (time, SIDE, SIDE, 3)."""
    frames = int(rng.integers(2 * FPS, 4 * FPS + 1))
    time = np.linspace(0, 1, frames, dtype=np.float32)
    shake = np.clip(np.cumsum(rng.normal(0, 0.3, (frames, 2)), axis=0).round().astype(int), -MARGIN, MARGIN)
    canvas = _texture(background, rng)
    image = np.stack([canvas[MARGIN + j : MARGIN + j + SIDE, MARGIN + i : MARGIN + i + SIDE] for i, j in shake])
    grid = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    # coordinates of the scene as the shaking camera sees them
    x = grid[None, None, :] + (shake[:, 0, None, None] / SIDE).astype(np.float32)
    y = grid[None, :, None] + (shake[:, 1, None, None] / SIDE).astype(np.float32)
    for thing, (px, py, scale, alpha) in _motions(scene, time, rng):
        radius = RADIUS[thing.size] * float(rng.uniform(0.9, 1.1)) * scale
        tilt = float(rng.uniform(-0.2, 0.2))
        dx, dy = x - px[:, None, None], y - py[:, None, None]
        u, v = _rotate(dx, dy, tilt)
        r = radius[:, None, None]
        edge = SHAPES[thing.shape](u / r, v / r) * r * SIDE  # signed distance to the outline, in pixels
        cover = np.clip(0.5 - edge, 0, 1) * alpha[:, None, None]
        colour = np.array(RGB[thing.colour], np.float32) + rng.normal(0, 8, 3).astype(np.float32)
        touched = cover > 0
        image[touched] += cover[touched][:, None] * (colour - image[touched])
    image *= float(rng.uniform(0.85, 1.1))
    image += rng.integers(-8, 9, image.shape, dtype=np.int8)
    return np.clip(image, 0, 255).astype(np.uint8)


def _texture(background: str, rng: np.random.Generator) -> Array:
    """A background (SIDE + 2 MARGIN, SIDE + 2 MARGIN, 3), larger than a frame by the camera shake."""
    axis = np.arange(-MARGIN, SIDE + MARGIN, dtype=np.float32) / SIDE
    x, y = np.meshgrid(axis, axis)
    angle, frequency = float(rng.uniform(0, np.pi)), float(rng.uniform(25, 45))
    u, v = _rotate(x, y, angle)
    if background == "striped":
        pattern = np.sin(frequency * u)
    elif background == "checkered":
        pattern = np.sign(np.sin(frequency * u) * np.sin(frequency * v))
    elif background == "dotted":
        pattern = np.sin(frequency * u) * np.sin(frequency * v)
        pattern = (pattern > 0.6) * 2.0 - 1
    else:  # cloudy: a few slow waves
        pattern = np.zeros_like(u)
        for _ in range(5):
            kx, ky, phase = float(rng.normal(0, 7)), float(rng.normal(0, 7)), float(rng.uniform(0, 6.3))
            pattern = pattern + 0.5 * np.sin(kx * x + ky * y + phase)
    base = rng.uniform(50, 110, 3).astype(np.float32)
    contrast = rng.uniform(-14, 14, 3).astype(np.float32)
    return (base + contrast * pattern[..., None]).astype(np.float32)


Motion = tuple[Array, Array, Array, Array]


def _motions(scene: Scene, t: Array, rng: np.random.Generator) -> list[tuple[Thing, Motion]]:
    """Position (x, y), scale and opacity over time of each object; objects behind come first."""
    one, ramp = np.ones_like(t), t
    lane, other_lane = (float(rng.uniform(0.3, 0.7)) for _ in range(2))
    start, end = float(rng.uniform(0.1, 0.22)), float(rng.uniform(0.78, 0.9))
    path = (start + (end - start) * ramp).astype(np.float32)
    moment = float(rng.uniform(0.35, 0.6))
    on = np.clip((t - moment) / 0.06, 0, 1).astype(np.float32)
    turn = (float(rng.uniform(0, 2 * np.pi)) + 2 * np.pi * ramp).astype(np.float32)
    if scene.b is None:
        still = (lane * one, other_lane * one)
        motions: dict[str, Motion] = {
            "moves right": (path, lane * one, one, one),
            "moves left": (1 - path, lane * one, one, one),
            "moves up": (lane * one, 1 - path, one, one),
            "moves down": (lane * one, path, one, one),
            "grows": (*still, 0.5 + 1.2 * ramp, one),
            "shrinks": (*still, 1.7 - 1.2 * ramp, one),
            "appears": (*still, one, on),
            "disappears": (*still, one, 1 - on),
            "turns clockwise": (0.5 + 0.26 * np.cos(turn), 0.5 + 0.26 * np.sin(turn), one, one),
            "turns back": (0.5 + 0.26 * np.cos(turn), 0.5 - 0.26 * np.sin(turn), one, one),
        }
        return [(scene.a, motions[scene.action])]
    return _pair_motions(scene, t, on, turn, rng)


def _pair_motions(
    scene: Scene, t: Array, on: Array, turn: Array, rng: np.random.Generator
) -> list[tuple[Thing, Motion]]:
    assert scene.b is not None
    one = np.ones_like(t)
    # two positions on opposite sides, mirrored or transposed at random
    near, far, lane, drift = (
        float(rng.uniform(*span)) for span in ((0.2, 0.28), (0.72, 0.8), (0.35, 0.65), (-0.1, 0.1))
    )
    flip, upright = bool(rng.random() < 0.5), bool(rng.random() < 0.5)

    def position(along: Array, across: Array) -> tuple[Array, Array]:
        along = 1 - along if flip else along
        return (across, along) if upright else (along, across)

    a_far, b_near = position(far * one, (lane + drift) * one), position(near * one, lane * one)
    coming = far - (far - near - 0.27) * t
    leaving = near + 0.27 + (far - near - 0.27) * t
    b_path = 0.3 + 0.55 * t
    motions: dict[str, tuple[Motion, Motion]] = {
        "after": ((*a_far, one, on), (*b_near, one, one)),
        "before": ((*a_far, one, 1 - on), (*b_near, one, one)),
        "towards": ((*position(coming, (lane + drift) * one), one, one), (*b_near, one, one)),
        "away": ((*position(leaving, (lane + drift) * one), one, one), (*b_near, one, one)),
        "around": (
            (0.5 + 0.31 * np.cos(turn), 0.5 + 0.31 * np.sin(turn), one, one),
            (0.5 * one, 0.5 * one, one, one),
        ),
        "follows": ((b_path - 0.33 + 0.13 * t, lane * one, one, one), (b_path, (lane + drift) * one, one, one)),
    }
    a, b = motions[scene.action]
    return [(scene.b, b), (scene.a, a)]


def _rotate(x: Array, y: Array, angle: float) -> tuple[Array, Array]:
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos - y * sin, x * sin + y * cos


def _box(u: Array, v: Array, w: float, h: float) -> Array:
    return np.maximum(np.abs(u) - w, np.abs(v) - h)


SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda u, v: np.sqrt(u * u + v * v) - 0.95,
    "square": lambda u, v: _box(u, v, 0.82, 0.82),
    "triangle": lambda u, v: np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.5 * 1.05,
    "cross": lambda u, v: np.minimum(_box(u, v, 1.0, 0.3), _box(u, v, 0.3, 1.0)),
}
"""Signed distance to a shape of radius 1, positive outside; y points down."""
