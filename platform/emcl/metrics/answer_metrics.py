"""Metrics of open-ended question answering with a fixed vocabulary of answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

QUESTION_TYPES = ("what", "who", "how", "when", "where")


def question_type(question: str) -> str:
    """The question's first word, or `other` if it is not one of MSRVTT-QA's five types."""
    first = question.lower().split(maxsplit=1)[0] if question.strip() else ""
    return first if first in QUESTION_TYPES else "other"


def answer_metrics(
    top_QK: NDArray[np.int64], right_Q: NDArray[np.int64], questions: Sequence[str], *, most_frequent: int
) -> dict[str, float]:
    """Metrics in per cent, over all questions unless stated otherwise.

    Args:
        top_QK: ranked answers, best first, as vocabulary indices; K is at least 5 if the vocabulary is that large.
        right_Q: each question's answer; -1 if it is not in the vocabulary, -2 if it is, but cannot be chosen: both
            count as wrong.
        questions: their texts.
        most_frequent: the most frequent training answer, for the baseline.

    Returns:
        accuracy, accuracy_in_vocabulary (over the questions whose answer is in the vocabulary), top_5, most_frequent
        (accuracy of always giving that answer), answers_in_vocabulary (share), type/NAME for each type that occurs.
    """
    hit_QK = (top_QK == right_Q[:, None]) & (right_Q >= 0)[:, None]
    hit, known = hit_QK[:, 0], right_Q != -1
    metrics = {
        "accuracy": hit.mean(),
        "accuracy_in_vocabulary": hit[known].mean() if known.any() else 0.0,
        "top_5": hit_QK[:, :5].any(1).mean(),
        "most_frequent": (right_Q == most_frequent).mean(),
        "answers_in_vocabulary": known.mean(),
    }
    types = np.array([question_type(question) for question in questions])
    for name in (*QUESTION_TYPES, "other"):
        if (types == name).any():
            metrics[f"type/{name}"] = hit[types == name].mean()
    return {name: 100 * float(value) for name, value in metrics.items()}
