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
"""Name under which each video's BLEU statistics are stored."""
TOKENIZERS = ("ptb", "plain", "given")


@dataclass(frozen=True)
class CaptionScores:
    """Scores on pycocoevalcap's own scale (CIDEr up to 10, the others up to 1)."""

    metrics: dict[str, float]
    tokenizer: str
    """`ptb`; `plain`, our own for machines without Java, with different scores; `given`, texts already tokenised."""
    missing: str | None = None
    """Metrics that could not be computed, with the reason."""
    each: dict[str, list[float]] = field(default_factory=dict)
    """Per-video values of the metrics that are a mean over videos, in the order of the hypotheses."""
    counts: list[list[int]] = field(default_factory=list)
    """Each video's BLEU statistics, which are summed over videos before BLEU is computed (`bleu`)."""


def plain_tokens(caption: str) -> str:
    """Lower-cased words and numbers, separated by spaces."""
    return " ".join(re.findall(r"[\w']+", caption.lower()))


def caption_metrics(
    hypotheses: Mapping[str, str], references: Mapping[str, Sequence[str]], *, tokenizer: str = "ptb"
) -> CaptionScores:
    """Scores one caption per video against all its references. Both sides are always tokenised alike.

    Args:
        hypotheses: video -> caption.
        references: video -> captions, of the same videos.
        tokenizer: `ptb` (falls back to `plain` if Java does not work), `plain` or `given`.

    Raises:
        ValueError: different videos on the two sides, no video, or a video without references.
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
    """Corpus BLEU-n (up to 1) from the sum (10,) of the videos' `counts`, computed as in pycocoevalcap."""
    words, nearest, guesses, matches = counts[0], counts[1], counts[2 : 2 + n], counts[6 : 6 + n]
    precision = float(np.prod((matches + 1e-15) / (guesses + 1e-9)) ** (1 / n))
    ratio = (words + 1e-15) / (nearest + 1e-9)
    return precision if ratio >= 1 else precision * float(np.exp(1 - 1 / ratio))


def _tokenise(spoken: dict[str, list[str]], written: dict[str, list[str]], tokenizer: str) -> tuple[str, str | None]:
    """Tokenises both sides in place; returns the tokenizer used, and what is missing."""
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
    """Metrics, per-video values of those that are a mean, and each video's BLEU statistics."""
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
    return metrics, each, [_bleu_counts(statistics) for statistics in scorer.ctest]


def _bleu_counts(statistics: Mapping[str, Any]) -> list[int]:
    """(10,): words of the caption and of the reference closest in length, n-grams (n = 1..4), matching n-grams."""
    words = statistics["testlen"]
    nearest = min((abs(length - words), length) for length in statistics["reflen"])[1]
    return [words, nearest, *statistics["guess"], *statistics["correct"]]
