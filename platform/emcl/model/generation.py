"""How captions are decoded; settings alone, so that they are read without PyTorch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How captions are written; the names of transformers' `generate`, where its documentation says more."""

    num_beams: int = 5
    """1 is greedy."""
    length_penalty: float = 1.0
    """Above 1 prefers longer captions, below shorter ones."""
    no_repeat_ngram_size: int = 3
    """No sequence of so many tokens twice; 0 allows it."""
    do_sample: bool = False
    """Draw tokens by their probability; with `num_beams=1`."""
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 30
    use_cache: bool = True
    """Keep each layer's keys and values."""
