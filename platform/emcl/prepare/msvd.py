"""MSVD and MSVD-QA as published.

`{train,val,test}_list.txt`; captions as `raw-captions.pkl` (a dict of token lists), or as a JSON of sentences or token
lists by clip. Questions: `{train,val,test}_qa.json` with video numbers; `youtube_mapping.txt` maps them to names.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

from emcl.errors import UserError
from emcl.prepare.clips import Clip
from emcl.prepare.msrvtt import questions_of
from emcl.prepare.published import folder_of, json_of, lines_of


def read(annotations: Path, split: str) -> list[Clip]:
    """Clips of the published split (1,200 / 100 / 670)."""
    folder = folder_of(annotations)
    captions = _captions(folder)
    clips = []
    for subset in ("train", "val", "test"):
        for name in lines_of(folder, f"{subset}_list.txt", what="MSVD's split"):
            clip = Clip(name, name, subset)
            clip.add_captions(
                text if isinstance(text, str) else " ".join(str(word) for word in text)
                for text in captions.get(name, [])
            )
            clips.append(clip)
    return clips


def read_qa(annotations: Path, split: str) -> list[Clip]:
    folder = folder_of(annotations)
    names = {}
    for line in lines_of(folder, "youtube_mapping.txt", what="MSVD-QA's names of videos"):
        name, _, number = line.rpartition(" ")
        names[int(number.removeprefix("vid"))] = name
    try:
        return questions_of(folder, names.__getitem__)
    except KeyError as error:
        raise UserError(f"{folder}: a question about video {error}, which youtube_mapping.txt does not name") from None


def _captions(folder: Path) -> dict[str, Any]:
    pickled = folder / "raw-captions.pkl"
    if pickled.is_file():
        return read_plain_pickle(pickled)
    return json_of(folder, "raw-captions.json", "captions_msvd.json", what="MSVD's captions (or raw-captions.pkl)")


def read_plain_pickle(path: Path) -> dict[str, Any]:
    """Reads a pickle of dicts, lists, tuples, strings, bytes and numbers; rejects any class or function.

    Raises:
        UserError: it refers to a class or function, or is not a dict.
    """
    try:
        content = _Plain(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no plain pickle of captions: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not captions by clip")
    return {str(_text(name)): [_text(caption) for caption in captions] for name, captions in content.items()}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which data does not need")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to an object outside of it")


def _text(item: Any) -> Any:
    """Decodes Python 2 strings, which are bytes."""
    if isinstance(item, bytes):
        return item.decode("utf-8", "replace")
    return [_text(element) for element in item] if isinstance(item, list | tuple) else item
