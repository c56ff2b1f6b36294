"""Reads the annotation table of user videos, to make shards with one command.

    emcl prepare folder --videos DIR_OR_TAR --annotations captions.csv --out shards/mine

The table has a header with `file` and `caption` and one line per caption, so a file may occur several times. Optional
columns: `split` (default: train), `id`, `start` and `end` in seconds. A JSON list or JSON Lines of objects is also
accepted, with `captions` as a list.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emcl.data.samples import QAPair
from emcl.errors import UserError
from emcl.prepare.clips import Clip


def read_table(path: Path) -> list[Clip]:
    """Clips of a CSV, a JSON list or JSON Lines.

    Raises:
        UserError: no such file, no `file` and `caption` columns, or an invalid line.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such annotation file")
    clips: dict[tuple[str, str], Clip] = {}
    for number, row in enumerate(_rows(path), 2 if path.suffix == ".csv" else 1):
        where = f"{path}, line {number}"
        file = str(row.get("file") or "").strip()
        captions = row.get("captions") or ([row["caption"]] if row.get("caption") else [])
        if not file:
            raise UserError(f"{where}: no `file`")
        split = str(row.get("split") or "train").strip()
        try:
            start, end = (float(row[key]) if row.get(key) not in (None, "") else None for key in ("start", "end"))
        except ValueError:
            raise UserError(
                f"{where}: start and end are seconds, not {row.get('start')!r} and {row.get('end')!r}"
            ) from None
        identity = str(row.get("id") or "").strip() or Path(file).with_suffix("").as_posix() + (
            f"_{start}_{end}" if start is not None or end is not None else ""
        )
        clip = clips.setdefault((split, identity), Clip(file, identity, split, start=start, end=end))
        if (clip.file, clip.start, clip.end) != (file, start, end):
            raise UserError(f"{where}: the id {identity!r} is taken by another clip of {clip.file}")
        clip.add_captions(captions)
        clip.qa += [_pair(pair, where) for pair in row.get("qa") or []]
    if not clips:
        raise UserError(f"{path} lists no clip")
    return list(clips.values())


def _pair(given: Any, where: str) -> QAPair:
    """Parses `[question, answer]`, or an object with both.

    Raises:
        UserError: neither.
    """
    both = [given.get("question"), given.get("answer")] if isinstance(given, dict) else given
    if not (isinstance(both, list) and len(both) == 2 and all(isinstance(text, str) for text in both)):
        raise UserError(f"{where}: qa wants [question, answer], two texts, not {given!r}")
    return {"question": both[0], "answer": both[1]}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            if path.suffix == ".csv":
                reader = csv.DictReader(stream)
                fields = reader.fieldnames or []
                if "file" not in fields or "caption" not in fields:
                    raise UserError(
                        f"{path}: the header must name `file` and `caption`, not {', '.join(fields) or 'nothing'}"
                    )
                yield from reader
            elif path.suffix == ".json":
                yield from json.load(stream)
            else:
                yield from (json.loads(line) for line in stream if line.strip())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as {path.suffix or 'JSON Lines'}: {error}") from None
