"""Captions as the text tower's input: tokens, or a frozen tower's remembered output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor


class Caption(NamedTuple):
    """One caption of one sample."""

    row: int
    number: int
    """Which of the sample's captions."""
    text: str


class TextSource(Protocol):
    """Makes what `Backbone.encode_text` takes."""

    def __call__(self, captions: Sequence[Caption]) -> Tensor: ...

    def filler(self) -> Tensor:
        """One text of no meaning, for a rank that has nothing to encode while others do."""
        ...


class Tokens:
    """(B, words) token ids."""

    def __init__(self, tokenize: Callable[[list[str]], Tensor]) -> None:
        self.tokenize = tokenize

    def __call__(self, captions: Sequence[Caption]) -> Tensor:
        return self.tokenize([caption.text for caption in captions])

    def filler(self) -> Tensor:
        return self.tokenize([""])
