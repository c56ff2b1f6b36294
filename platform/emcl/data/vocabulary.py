"""The vocabulary of a caption decoder: the tokens of a tokenizer that occur in the training captions.

CLIP's BPE has 49,408 tokens, of which a data set's captions use few. A softmax over all of them would be most of the
decoder's work, and the unused tokens could never be generated meaningfully.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from emcl.errors import UserError, first_line

PADDING, START, END = 0, 1, 2


class Vocabulary(Protocol):
    """Captions to token ids and back."""

    size: int
    padding: int
    start: int
    end: int

    def encode(self, caption: str) -> list[int]:
        """Ids without start and end; tokens outside the vocabulary are dropped."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The caption up to the first end token."""
        ...


class UsedTokens:
    """The used tokens of a tokenizer, numbered without gaps after padding, start and end."""

    padding, start, end = PADDING, START, END

    def __init__(self, tokenizer: Any, used: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(used)
        self._number_of = {token: number for number, token in enumerate(self._ids, 3)}
        self.size = 3 + len(self._ids)

    @staticmethod
    def of_captions(folder: str | None, captions: Iterable[str]) -> str:
        """The used tokens as text for the configuration: one bit per token, in base64."""
        tokenizer = _tokenizer(folder)
        used = {token for caption in captions for token in tokenizer.encode(caption)}
        bits = np.zeros(max(used, default=0) + 1, bool)
        bits[list(used)] = True
        return base64.b64encode(np.packbits(bits).tobytes()).decode()

    @staticmethod
    def of_first(count: int) -> str:
        """The first `count` tokens, CLIP's most frequent ones; used while the captions are not known yet."""
        return base64.b64encode(np.packbits(np.ones(count, bool)).tobytes()).decode()

    @staticmethod
    def open(folder: str | None, bits: str) -> UsedTokens:
        """Opens the result of `of_captions`; `folder` has a Hugging Face tokenizer, None means CLIP's BPE."""
        used = np.flatnonzero(np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8)))
        return UsedTokens(_tokenizer(folder), used.tolist())

    def encode(self, caption: str) -> list[int]:
        return [self._number_of[token] for token in self._tokenizer.encode(caption) if token in self._number_of]

    def decode(self, ids: Sequence[int]) -> str:
        kept: list[int] = []
        for number in ids:
            if number == END:
                break
            if number > END:
                kept.append(self._ids[number - 3])
        return self._tokenizer.decode(kept)


class WholeVocabulary:
    """All tokens of a pretrained decoder's own tokenizer."""

    def __init__(self, folder: str) -> None:
        self._tokenizer = _tokenizer(folder)
        inner = self._tokenizer.inner
        self.size = len(inner)
        self.end = inner.eos_token_id
        self.start = self.end if inner.bos_token_id is None else inner.bos_token_id
        self.padding = self.end if inner.pad_token_id is None else inner.pad_token_id

    def encode(self, caption: str) -> list[int]:
        return self._tokenizer.encode(caption)

    def decode(self, ids: Sequence[int]) -> str:
        kept: list[int] = []
        for token in ids:
            if token == self.end and kept:
                break
            if token not in (self.start, self.padding, self.end):
                kept.append(token)
        return self._tokenizer.decode(kept)


class _Clip:
    """CLIP's byte-pair encoding."""

    def __init__(self) -> None:
        import open_clip

        self.inner = open_clip.SimpleTokenizer()

    def encode(self, caption: str) -> list[int]:
        return self.inner.encode(" ".join(caption.split()))

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids)).strip()


class _HuggingFace:
    def __init__(self, folder: str) -> None:
        from transformers import AutoTokenizer

        if not Path(folder).is_dir():
            raise UserError(f"tokenizer={folder}: no such folder")
        try:
            self.inner = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no tokenizer: {first_line(error)}") from None

    def encode(self, caption: str) -> list[int]:
        return self.inner.encode(" ".join(caption.split()), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.inner.decode(list(ids), skip_special_tokens=True)).strip()


@lru_cache(maxsize=4)
def _tokenizer(folder: str | None) -> Any:
    return _Clip() if folder is None else _HuggingFace(folder)
