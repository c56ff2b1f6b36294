"""Captions as the text tower's input: tokens, or a frozen tower's remembered output (data/split.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]
"""Texts -> (n, L) token ids, of the longest of them or of one length always."""


class Caption(NamedTuple):
    """One caption of one sample."""

    row: int
    number: int
    """Which of the sample's captions."""
    text: str


class TextSource(Protocol):
    """Makes what `Backbone.encode_text` takes."""

    def text(self, captions: Sequence[Caption]) -> Tensor:
        """A row for each caption."""
        ...

    def filler(self) -> Tensor:
        """One text of no meaning, for a rank that has nothing to encode while others do."""
        ...


@dataclass(frozen=True)
class Tokens:
    """(n, L) token ids."""

    tokenize: Tokenizer

    def text(self, captions: Sequence[Caption]) -> Tensor:
        return self.tokenize([caption.text for caption in captions])

    def filler(self) -> Tensor:
        return self.tokenize([""])
