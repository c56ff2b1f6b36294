"""Reading published annotation files: plain or zipped, JSON or lists, with errors that name what is wrong."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from emcl.errors import UserError


def folder_of(annotations: Path) -> Path:
    if not annotations.is_dir():
        raise UserError(f"--annotations {annotations}: no such folder")
    return annotations


def find_text(folder: Path, *names: str) -> tuple[str, str] | None:
    """Name and text of the first of these files, plain or inside one of the folder's zip files, if one is there."""
    for name in names:
        if (folder / name).is_file():
            return name, (folder / name).read_text(encoding="utf-8-sig")
    for path in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for name in names:
                for member in archive.namelist():
                    if Path(member).name == name:
                        return name, archive.read(member).decode("utf-8-sig")
    return None


def text_of(folder: Path, *names: str, what: str) -> str:
    """The text that `find_text` gives.

    Raises:
        UserError: none of them is there.
    """
    return _found(folder, names, what)[1]


def _found(folder: Path, names: tuple[str, ...], what: str) -> tuple[str, str]:
    found = find_text(folder, *names)
    if found is None:
        raise UserError(f"{folder} holds no {' or '.join(names)}, plain or zipped: {what}")
    return found


def json_of(folder: Path, *names: str, what: str) -> Any:
    """The content of a published JSON, or of JSON Lines as a list."""
    name, text = _found(folder, names, what)
    try:
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{folder / name} is not readable as JSON: {error}") from None


def csv_of(folder: Path, *names: str, what: str) -> Iterator[dict[str, str]]:
    return csv.DictReader(text_of(folder, *names, what=what).splitlines())


def lines_of(folder: Path, *names: str, what: str) -> list[str]:
    """The lines that are not empty."""
    return [line.strip() for line in text_of(folder, *names, what=what).splitlines() if line.strip()]


def paragraph(sentences: Iterable[str]) -> str:
    """All sentences of a video as one text."""
    return " ".join(" ".join(sentence.split()) for sentence in sentences)
