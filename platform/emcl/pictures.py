"""Pictures for people: a query beside the videos that were found for it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from emcl.data.decode import Frames

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 3
"""Frames of each video."""
REFERENCES = 3
"""Of each video, beside what was generated."""

FramesOf = Callable[[int], Frames]
"""Some frames of a row of the shards."""


@dataclass(frozen=True)
class Example:
    """A query with what was found for it."""

    query: str
    right: int
    """Row of the shards."""
    found: list[int]
    """Rows, best first."""


def draw_retrieval(examples: Sequence[Example], title: str, path: Path, frames_of: FramesOf) -> None:
    """One line an example: the query, its own video, and the top 5; the right one has a green frame."""
    columns = 1 + max(len(example.found) for example in examples)
    figure = blank_figure(2.6 * columns + 2.4, 1.15 * len(examples) + 0.7)
    axes = figure.subplots(len(examples), columns + 1, squeeze=False)
    heads = ["the query's own", *(f"found {n}" for n in range(1, columns))]
    for axis, head in zip(axes[0][1:], heads, strict=True):
        axis.set_title(head, fontsize=9)
    for line, example in zip(axes, examples, strict=True):
        line[0].text(0, 0.5, textwrap.fill(example.query, 26), va="center", fontsize=9)
        for place, row in enumerate([example.right, *example.found]):
            axis = line[1 + place]
            axis.imshow(strip(frames_of(row)))
            if place and row == example.right:
                for spine in axis.spines.values():
                    spine.set(color="tab:green", linewidth=3)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(axis is not line[0])
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path)


@dataclass(frozen=True)
class Captioned:
    """A video with what was written for it and what people wrote."""

    row: int
    generated: str
    references: list[str]


def draw_captions(examples: Sequence[Captioned], title: str, path: Path, frames_of: FramesOf) -> None:
    """One line an example: frames, the generated caption, some references."""
    figure = blank_figure(9, 1.3 * len(examples) + 0.5)
    for line, example in zip(figure.subplots(len(examples), 2, squeeze=False), examples, strict=True):
        line[0].imshow(strip(frames_of(example.row)))
        line[1].text(0, 0.9, textwrap.fill(example.generated, 60), va="top", fontsize=10, weight="bold")
        written = "\n".join(textwrap.shorten(text, 75) for text in example.references[:REFERENCES])
        line[1].text(0, 0.6, written, va="top", fontsize=8, color="0.35")
        for axis in line:
            axis.set_axis_off()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path)


def draw_confusion(
    answers: Sequence[str], counts: NDArray[np.int64], title: str, path: Path, _frames_of: FramesOf
) -> None:
    """Right answers down, given ones across: shares of each line, and the counts.

    Args:
        answers: names of the lines and of all but the last column, which is everything else.
        counts: (lines, lines + 1)
    """
    figure = blank_figure(1.8 + 0.5 * (len(answers) + 1), 1.6 + 0.45 * len(answers))
    axis = figure.subplots()
    share = counts / counts.sum(1, keepdims=True).clip(1)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for line, column in np.ndindex(*counts.shape):
        if counts[line, column]:
            colour = "w" if share[line, column] > 0.6 else "0.2"
            count = str(counts[line, column])
            axis.text(column, line, count, ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(answers) + 1), [*answers, "(other)"], rotation=60, ha="right", fontsize=8)
    axis.set_yticks(range(len(answers)), answers, fontsize=8)
    axis.set(xlabel="given", ylabel="right", title=title)
    figure.tight_layout()
    figure.savefig(path)


def strip(clip: Frames) -> Frames:
    """Some frames beside each other."""
    chosen = clip[np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)]
    return np.concatenate(list(chosen), axis=1)


def blank_figure(width: float, height: float) -> Figure:
    """Inches, without a window system."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110)
    FigureCanvasAgg(figure)
    return figure
