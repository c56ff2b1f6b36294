"""What a report shows of captions: metrics beside published figures, and captions beside what people wrote."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emcl.metrics.bootstrap import interval_of
from emcl.metrics.caption_metrics import COUNTS, bleu
from emcl.pictures import FramesOf, blank_figure, strip
from emcl.task import Case, Published, Result, Shown, TaskReport
from emcl.task.task_report import Interval, PictureOf, best_and_worst

DRAWN = 6
"""Captions in a run's picture."""
REFERENCES = 3
"""References of each video, beside the generated caption."""


def _bleu_in_per_cent(n: int, counts: NDArray[np.float64]) -> float:
    return 100 * bleu(counts, n)


PUBLISHED = {
    ("msrvtt", "official"): [
        Published(
            "EMCL", "EMCL, NeurIPS 2022", {"BLEU-4": 45.3, "METEOR": 30.2, "ROUGE-L": 63.2, "CIDEr": 54.6}
        )
    ]
}  # fmt: skip


class CaptioningReport(TaskReport):
    """BLEU, METEOR, ROUGE-L and CIDEr."""

    columns = ("BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
    published = PUBLISHED

    def columns_of(self, metrics: Sequence[str]) -> list[str]:
        """Scores by another tokenizer than PTB's have separate columns."""
        return [*self.columns, *(name for name in metrics if name.endswith("_tokens"))]

    def intervals(self, result: Result) -> dict[str, Interval]:
        bounds = super().intervals(result)
        for name in result.metrics:
            if name.startswith("BLEU-") and COUNTS in result.items:
                bounds[name] = interval_of(result.items[COUNTS], partial(_bleu_in_per_cent, int(name[5])))
        return bounds

    def cases(self, result: Result, picture: PictureOf) -> dict[str, list[Case]]:
        items = result.items
        name = next((name for name in items if name.startswith("CIDEr")), None)
        if name is None:
            return {}

        def case(index: int) -> Case:
            outcome = f"{name} {items[name][index]:.0f}; a person wrote: {items['reference'][index]}"
            return Case(items["caption"][index], outcome, [Shown.of(items["id"][index], picture)])

        return best_and_worst(items[name], case)


@dataclass(frozen=True)
class Captioned:
    """A video with its generated caption and its references."""

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
