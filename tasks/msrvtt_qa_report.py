"""What a report shows of answers: accuracies beside published figures, some right and wrong ones, confusions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emcl.pictures import FramesOf, blank_figure
from emcl.task import Case, Published, Result, Shown, TaskReport
from emcl.task.task_report import EXAMPLES, PictureOf

SHOWN = 12
"""Answers in the picture of the confusion matrix."""


PUBLISHED = {("msrvtt-qa", "official"): [Published("EMCL", "EMCL, NeurIPS 2022", {"accuracy_in_vocabulary": 45.8})]}


class AnswersReport(TaskReport):
    """Accuracies, over all questions and over those with a known answer."""

    columns = ("accuracy", "accuracy_in_vocabulary", "top_5", "most_frequent")
    published = PUBLISHED

    def cases(self, result: Result, picture: PictureOf) -> dict[str, list[Case]]:
        """Evenly chosen right answers, and wrong ones."""
        items = result.items
        if not items:
            return {}

        def case(index: int) -> Case:
            right = items["answer"][index] or "an answer that training had not"
            outcome = f"given: {items['given'][index]}; right: {right}"
            return Case(items["question"][index], outcome, [Shown.of(items["id"][index], picture)])

        def evenly(indices: NDArray[np.intp]) -> list[Case]:
            chosen = np.linspace(0, len(indices) - 1, min(EXAMPLES, len(indices))).astype(int)
            return [case(int(index)) for index in indices[chosen]]

        hit = np.array(items["accuracy"]) > 0
        return {"Best": evenly(np.flatnonzero(hit)), "Worst": evenly(np.flatnonzero(~hit))}


def confusion(
    given_Q: NDArray[np.int64], right_Q: NDArray[np.int64], answers: Sequence[str]
) -> tuple[list[str], NDArray[np.int64]]:
    """The most frequent right answers of this split: (lines, lines + 1), the last column any other answer."""
    asked = Counter(right_Q[right_Q >= 0].tolist())
    kept = [number for number, _ in asked.most_common(SHOWN)]
    columns = {number: column for column, number in enumerate(kept)}
    counts = np.zeros((len(kept), len(kept) + 1), np.int64)
    for given, right in zip(given_Q.tolist(), right_Q.tolist(), strict=True):
        if right in columns:
            counts[columns[right], columns.get(given, len(kept))] += 1
    return [answers[number] for number in kept], counts


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
