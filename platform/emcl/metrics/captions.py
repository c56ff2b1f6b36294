"""Caption metrics through pycocoevalcap: BLEU, METEOR, ROUGE-L, CIDEr, over all references of a video."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emcl.metrics.java import JavaError, find_java, meteor, ptb_tokens

COUNTS = "bleu_counts"
"""What is kept of each video under this name."""
TOKENIZERS = ("ptb", "plain", "given")


@dataclass(frozen=True)
class CaptionScores:
    """Scores on pycocoevalcap's own scale (CIDEr up to 10, the others up to 1)."""

    metrics: dict[str, float]
    tokenizer: str
    """`ptb`; `plain`, our own for machines without Java, whose scores differ; `given`, tokens as they stand."""
    missing: str | None = None
    """What is not among the metrics, and why."""
    each: dict[str, list[float]] = field(default_factory=dict)
    """Of the metrics that are a mean over videos: the values of each, in the order of the hypotheses."""
    counts: list[list[int]] = field(default_factory=list)
    """Of each video, what BLEU adds up over all before it divides (`bleu`)."""


def plain_tokens(caption: str) -> str:
    """Lower case, words and numbers with a blank between."""
    return " ".join(re.findall(r"[\w']+", caption.lower()))


def caption_metrics(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], *, tokenizer: str = "ptb"
) -> CaptionScores:
    """Scores one caption a video against all its references. Both sides are always tokenised alike.

    Args:
        hypotheses: video -> caption.
        references: video -> captions, of the same videos.
        tokenizer: `ptb`, in whose place `plain` is taken where Java does not work; or `plain`; or `given`.

    Raises:
        ValueError: other videos on one side, or none, or a video without references.
    """
    if not hypotheses or set(hypotheses) != set(references) or not all(references.values()):
        raise ValueError("captions are scored for the same videos on both sides, each with references")
    keys = list(hypotheses)
    spoken = {key: [hypotheses[key]] for key in keys}
    written = {key: list(references[key]) for key in keys}
    tokenizer, missing = _tokenise(spoken, written, tokenizer)
    metrics, each, counts = _without_java(spoken, written)
    if missing is None:
        try:
            metrics["METEOR"] = meteor({key: texts[0] for key, texts in spoken.items()}, written)
        except JavaError as error:
            missing = f"METEOR: {error}"
    order = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr")
    return CaptionScores({name: metrics[name] for name in order if name in metrics}, tokenizer, missing, each, counts)


def bleu(counts: NDArray[np.floating], n: int) -> float:
    """BLEU-n (up to 1) of the sum (10,) of videos' `counts`, as pycocoevalcap computes it of a corpus."""
    words, nearest, guesses, found = counts[0], counts[1], counts[2 : 2 + n], counts[6 : 6 + n]
    precision = float(np.prod((found + 1e-15) / (guesses + 1e-9)) ** (1 / n))
    ratio = (words + 1e-15) / (nearest + 1e-9)
    return precision if ratio >= 1 else precision * float(np.exp(1 - 1 / ratio))


def _tokenise(spoken: dict[str, list[str]], written: dict[str, list[str]], tokenizer: str) -> tuple[str, str | None]:
    """Tokenises both sides in place; the tokenizer that served, and what is missing."""
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer {tokenizer!r} is none of {', '.join(TOKENIZERS)}")
    java = find_java()
    missing = f"METEOR: {java}" if isinstance(java, str) else None
    if tokenizer == "ptb" and missing is None:
        try:
            both = ptb_tokens(
                {
                    **{f"h{key}": one for key, one in spoken.items()},
                    **{f"r{key}": all_ for key, all_ in written.items()},
                }
            )
            for key in spoken:
                spoken[key], written[key] = both[f"h{key}"], both[f"r{key}"]
            return "ptb", None
        except JavaError as error:
            missing = f"METEOR and the PTB tokenizer: {error}"
    if tokenizer == "given":
        return "given", missing
    for side in (spoken, written):
        for key, texts in side.items():
            side[key] = [plain_tokens(text) for text in texts]
    return "plain", missing


def _without_java(
    spoken: dict[str, list[str]], written: dict[str, list[str]]
) -> tuple[dict[str, float], dict[str, list[float]], list[list[int]]]:
    """Metrics, the values of each video where they are a mean, and its counts for BLEU."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = BleuScorer(n=4)
    for key, texts in spoken.items():
        scorer += (texts[0], written[key])
    scores, _ = scorer.compute_score(option="closest", verbose=0)
    rouge, rouge_each = Rouge().compute_score(written, spoken)
    cider, cider_each = Cider().compute_score(written, spoken)
    metrics = {
        **{f"BLEU-{n}": float(score) for n, score in enumerate(scores, 1)},
        "ROUGE-L": float(rouge),
        "CIDEr": float(cider),
    }
    each = {"ROUGE-L": [float(x) for x in rouge_each], "CIDEr": [float(x) for x in cider_each]}
    return metrics, each, [_bleu_counts(found) for found in scorer.ctest]


def _bleu_counts(found: Mapping[str, Any]) -> list[int]:
    """Words of a caption, and of the reference nearest in length; its n-grams of 1 to 4 words; those found: (10,)."""
    words = found["testlen"]
    nearest = min((abs(length - words), length) for length in found["reflen"])[1]
    return [words, nearest, *found["guess"], *found["correct"]]
