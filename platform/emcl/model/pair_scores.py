"""What shared factors add to the scores of texts and videos: `emcl.em.SharedFactors` on the towers' outputs."""

from __future__ import annotations

import hashlib
import json

import torch
from numpy.typing import NDArray
from torch import Tensor

from emcl.em import SharedFactors
from emcl.errors import UserError

TEXTS_AT_ONCE = 4_096
NO_FACTORS = "none"
"""Fingerprint of no shared factors."""
FACTOR_WEIGHTS = "weights"
"""In `SharedFactors.facts`: by which they count in the scores of each task, by its name."""


def add_ratios(scores_QG: NDArray, text_QE: Tensor, video_GE: Tensor, log_odds_scale: float) -> None:
    """Adds each pair's log-likelihood ratio to its score, in place.

    Scores stay in the unit of a cosine: exp(logit_scale) times the sum are log-odds, to which both add as they are.

    Args:
        text_QE, video_GE: `SharedFactors.text_vectors` and `video_vectors`.
        log_odds_scale: exp(logit_scale), of the model's cosines.
    """
    for first in range(0, len(text_QE), TEXTS_AT_ONCE):
        block = slice(first, first + TEXTS_AT_ONCE)
        scores_QG[block] += (text_QE[block] @ video_GE.T).div_(log_odds_scale).numpy()


def check_fit(factors: SharedFactors) -> None:
    """Raises UserError: the pairs were too few, or what they show does not hold for others of them."""
    facts = factors.facts
    if facts["chosen"] != "by folds":
        raise UserError("too few videos with captions to find what they share")
    if facts["held_out"] <= 0:
        raise UserError(f"what {facts['pairs']:,} videos and their captions share does not hold for others of them")


def fingerprint_of(factors: SharedFactors | None) -> str:
    """A hash, so that vectors by different factors are never compared; NO_FACTORS of none."""
    if factors is None:
        return NO_FACTORS
    digest = hashlib.sha256(json.dumps(factors.facts.get(FACTOR_WEIGHTS)).encode())
    for name in sorted(factors.state_names):
        digest.update(getattr(factors, name).cpu().numpy().tobytes())
    return digest.hexdigest()


def weight_of(factors: SharedFactors, task: str) -> float:
    """By which the factors count in scores of a task; 0 if they do not."""
    return float(factors.facts.get(FACTOR_WEIGHTS, {}).get(task, 0.0))


def described_factors(factors: SharedFactors, task: str | None = None) -> str:
    """For people: `shared factors (K 128, of 3,500 videos and 70,000 texts)`, with their weight in a task's scores."""
    facts, weight = factors.facts, "" if task is None else f", weight {weight_of(factors, task):g}"
    made_of = f"of {facts['videos']:,} videos and {facts['texts']:,} texts"
    return f"shared factors (K {len(factors.correlation)}, {made_of}{weight})"


def exact_device(device: torch.device) -> torch.device:
    """Where factors that a model on `device` uses are kept: there, or on the CPU where it has no float64."""
    return torch.device("cpu") if device.type == "mps" else device
