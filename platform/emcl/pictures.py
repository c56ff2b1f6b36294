"""Helpers for pictures: figures without a window system, frames side by side, data URLs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from emcl.config import Config
from emcl.data.decode import decode
from emcl.data.frame_shapes import Frames
from emcl.data.shards import ShardSet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 3
"""Frames of each video."""

FramesOf = Callable[[int], Frames]
"""Some frames of a row of the shards."""


def strip(clip: Frames) -> Frames:
    """Some frames side by side."""
    chosen = clip[np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)]
    return np.concatenate(list(chosen), axis=1)


def blank_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    return figure


def drawn(draw: Callable[[Figure], None]) -> str:
    """A plot as a data URL."""
    figure = blank_figure(4.6, 3.4)
    draw(figure)
    figure.tight_layout()
    blob = io.BytesIO()
    figure.savefig(blob, format="png")
    return _data_url(blob.getvalue(), "png")


def strip_url(clip: Frames) -> str:
    """Some frames side by side, as a data URL."""
    from PIL import Image

    blob = io.BytesIO()
    Image.fromarray(strip(clip)).save(blob, "JPEG", quality=80)
    return _data_url(blob.getvalue(), "jpeg")


def frames_of(shards: ShardSet, config: Config, row: int) -> Frames:
    """Some small frames of a sample, for display."""
    entry = shards.rows[row]
    start, end = entry.sample.start, entry.sample.end
    return decode(shards.read(entry), frames=6, size=112, start=start, end=end, fps=config.data.fps)


def _data_url(blob: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(blob).decode()}"
