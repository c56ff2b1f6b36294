"""The tokenizers of open_clip's text towers, with each tower's own cleaning, length and padding.

Where padding reaches the embedding, all texts are padded to the tower's own length, as it was trained: a sentence then
has one embedding, whatever its neighbours in a batch are. Elsewhere they are padded to `data.max_tokens`, or to the
longest of a batch (Hugging Face models).
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch.nn.functional as F
from torch import Tensor

from emcl.data.captions import Tokenizer
from emcl.errors import UserError, first_line
from emcl.model.architecture_limits import CONTEXT

VOCABULARY, WITHOUT_MERGES = 49408, 514
"""Tokens of CLIP's byte pair encoding, and those that are no merges: twice the 256 bytes, start and end."""


def keeps_padding(text: Mapping[str, Any]) -> bool:
    """Whether padding reaches the embeddings of an open_clip text tower (`text_cfg`).

    It does where tokens look at those after them and padding is not masked, where the last place is pooled, and where a
    class token comes after the padding (CoCa). Hugging Face models get a mask.
    """
    if text.get("hf_model_name"):
        return False
    seen = bool(text.get("no_causal_mask")) and not text.get("use_pad_mask")
    return seen or text.get("pool_type") == "last" or bool(text.get("embed_cls"))


def tokenizer(text: Mapping[str, Any], max_tokens: int, *, name: str, folder: str | None = None) -> Tokenizer:
    """Texts to token ids, each text cut to `max_tokens`.

    Args:
        text: an architecture's `text_cfg`.
        name: of the architecture, for errors.
        folder: of a Hugging Face tokenizer's files, in place of the architecture's own.

    Raises:
        UserError: its files are missing, or the tower has fewer positions.
    """
    limit, kwargs = text.get("context_length", CONTEXT), text.get("tokenizer_kwargs", {})
    if not text.get("hf_model_name") and max_tokens > limit:  # an architecture of `local-dir:` is not known before
        raise UserError(f"data.max_tokens={max_tokens} is more than the {limit} positions of {name}'s text tower")
    source = text.get("hf_tokenizer_name")
    if source:
        kwargs = {**kwargs, "tokenizer_mode": text.get("tokenizer_mode")}
        tokenize = _hugging_face(source, folder, context_length=max_tokens, **kwargs)
        padding = int(tokenize.tokenizer.pad_token_id or 0)
        if text.get("hf_model_name"):
            return _Trimmed(tokenize, padding)
        return _Padded(tokenize, limit, padding) if keeps_padding(text) else tokenize
    if folder is not None:
        raise UserError(f"model.tokenizer={folder}: {name} has CLIP's own tokenizer, which needs no files")
    tokenize = open_clip.tokenizer.SimpleTokenizer(_byte_pairs(text, name), context_length=max_tokens, **kwargs)
    return _Padded(tokenize, limit, 0) if keeps_padding(text) else tokenize


def _hugging_face(source: str, folder: str | None, **kwargs: Any) -> open_clip.tokenizer.HFTokenizer:
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"model.tokenizer={folder}: no such folder")
    if folder is None:
        local_directory(source, "hf_tokenizer_name")
    try:
        return open_clip.tokenizer.HFTokenizer(folder or source, **kwargs)
    except (OSError, ValueError, ImportError) as error:
        if folder is not None:
            raise UserError(f"model.tokenizer={folder} holds no tokenizer: {first_line(error)}") from None
        raise UserError(
            f"the tokenizer {source} is neither on this machine nor can it be downloaded: model.tokenizer=FOLDER takes "
            f"its files ({first_line(error)})"
        ) from None


class _Trimmed:
    """Hugging Face tokens without the columns that are padding in every row, which would cost as much as words."""

    def __init__(self, tokenize: Tokenizer, padding: int) -> None:
        self.tokenize, self.padding = tokenize, padding

    def __call__(self, texts: list[str]) -> Tensor:
        tokens_BL = self.tokenize(texts)
        used = (tokens_BL != self.padding).any(0).nonzero()
        return tokens_BL[:, : int(used[-1]) + 1] if len(used) else tokens_BL[:, :1]


class _Padded:
    """Tokens padded to the tower's own length, however many of them are words."""

    def __init__(self, tokenize: Tokenizer, length: int, padding: int) -> None:
        self.tokenize, self.length, self.padding = tokenize, length, padding

    def __call__(self, texts: list[str]) -> Tensor:
        tokens_BL = self.tokenize(texts)
        return F.pad(tokens_BL, (0, self.length - tokens_BL.shape[1]), value=self.padding)


def local_directory(path: str, what: str) -> None:
    """Raises UserError: a path that is meant to be of this disk is no directory."""
    meant_locally = path.startswith((".", "/")) or Path(path).parent.name == "towers"
    if meant_locally and not Path(path).is_dir():
        raise UserError(f"{what}={path}: no such directory (`emcl towers` writes those that come as pip packages)")


def _byte_pairs(text: Mapping[str, Any], name: str) -> Any:
    """CLIP's byte pair encoding, cut to its first merges where a model has fewer tokens; what its tokenizer opens."""
    words, whole = text.get("vocab_size", VOCABULARY), open_clip.tokenizer.default_bpe()
    if words >= VOCABULARY:
        return whole
    if words < WITHOUT_MERGES:
        raise UserError(f"model {name}: vocab_size={words} has no room for the {WITHOUT_MERGES} tokens of single bytes")
    with gzip.open(whole) as stream:
        lines = stream.read().split(b"\n")[: 1 + words - WITHOUT_MERGES]  # the first is a heading
    return io.BytesIO(gzip.compress(b"\n".join(lines)))
