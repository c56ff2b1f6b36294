"""Pictures for people: a query beside the videos that were found for it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from emcl.data.decode import Frames
from emcl.task import Example

SHOWN = 3
"""Frames of each video."""


def draw_examples(path: Path, examples: Sequence[Example], frames_of: Callable[[int], Frames], title: str) -> None:
    """One line an example: the query, its own video, and the top 5; the right one has a green frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + max(len(example.found) for example in examples)
    figure = Figure(figsize=(2.6 * columns + 2.4, 1.15 * len(examples) + 0.7), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(examples), columns + 1, squeeze=False)
    heads = ["the query's own", *(f"found {n}" for n in range(1, columns))]
    for axis, head in zip(axes[0][1:], heads, strict=True):
        axis.set_title(head, fontsize=9)
    for line, example in zip(axes, examples, strict=True):
        line[0].text(0, 0.5, textwrap.fill(example.query, 26), va="center", fontsize=9)
        for place, row in enumerate([example.right, *example.found]):
            axis = line[1 + place]
            clip = frames_of(row)
            chosen = clip[np.linspace(0, len(clip) - 1, SHOWN).round().astype(int)]
            axis.imshow(np.concatenate(list(chosen), axis=1))
            if place and row == example.right:
                for spine in axis.spines.values():
                    spine.set(color="tab:green", linewidth=3)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(axis is not line[0])
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path)
