"""Reads published annotation files, plain or zipped, as JSON, CSV or lines."""

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
    """Name and text of the first of these files that exists, plain or inside a zip file of the folder; else None."""
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
    """The text of the first file that `find_text` finds.

    Raises:
        UserError: none of the files exists.
    """
    return _first_text(folder, names, what)[1]


def _first_text(folder: Path, names: tuple[str, ...], what: str) -> tuple[str, str]:
    name_and_text = find_text(folder, *names)
    if name_and_text is None:
        raise UserError(f"{folder} holds no {' or '.join(names)}, plain or zipped: {what}")
    return name_and_text


def json_of(folder: Path, *names: str, what: str) -> Any:
    """The content of a JSON file, or of JSON Lines as a list."""
    name, text = _first_text(folder, names, what)
    try:
        if name.endswith(".jsonl"):
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{folder / name} is not readable as JSON: {error}") from None


def csv_of(folder: Path, *names: str, what: str) -> Iterator[dict[str, str]]:
    return csv.DictReader(text_of(folder, *names, what=what).splitlines())


def lines_of(folder: Path, *names: str, what: str) -> list[str]:
    """The non-empty lines, stripped."""
    return [line.strip() for line in text_of(folder, *names, what=what).splitlines() if line.strip()]


def paragraph(sentences: Iterable[str]) -> str:
    """Joins all sentences of a video to one text."""
    return " ".join(" ".join(sentence.split()) for sentence in sentences)
