"""MSR-VTT's published annotations to the table that `emcl prepare folder` reads, for the 1k-A split.

Train: the 9k list with every official sentence; test: the 1,000 pairs of the JSFUSION list, or those videos with all
their sentences.
"""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from emcl.errors import UserError

OFFICIAL = ("train_val_videodatainfo.json", "test_videodatainfo.json")
TRAIN_LIST, TEST_LIST = "MSRVTT_train.9k.csv", "MSRVTT_JSFUSION_test.csv"


def write_csv(annotations: Path, out: Path, *, every_test_sentence: bool = False) -> dict[str, int]:
    """Writes `file,caption,split`; returns the number of lines of each split.

    1k-A pairs a test video with one sentence; with `every_test_sentence` it keeps all of its own, some 20.

    Raises:
        UserError: one of the published files is not in `annotations`, plain or zipped.
    """
    if not annotations.is_dir():
        raise UserError(f"--annotations {annotations}: no such folder")
    sentences: dict[str, list[str]] = {}
    for name in OFFICIAL:
        for item in _official(annotations, name)["sentences"]:
            sentences.setdefault(item["video_id"], []).append(item["caption"])
    lines = [
        (f"{row['video_id']}.mp4", text, "train")
        for row in _rows(annotations / TRAIN_LIST)
        for text in sentences.get(row["video_id"], [])
    ]
    for row in _rows(annotations / TEST_LIST):
        found = sentences.get(row["video_id"], []) if every_test_sentence else [row["sentence"]]
        lines += [(f"{row['video_id']}.mp4", text, "test") for text in found]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["file", "caption", "split"])
        writer.writerows(lines)
    return {split: sum(line[2] == split for line in lines) for split in ("train", "test")}


def _official(folder: Path, name: str) -> Any:
    """A published JSON, plain or inside one of the folder's zip files."""
    if (folder / name).is_file():
        return json.loads((folder / name).read_text(encoding="utf-8"))
    for path in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if Path(member).name == name:
                    return json.loads(archive.read(member))
    raise UserError(f"{folder} holds no {name}, plain or zipped: it is MSR-VTT's official annotation")


def _rows(path: Path) -> Iterator[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file; it is the published list of the 1k-A split")
    with path.open(newline="", encoding="utf-8-sig") as stream:
        yield from csv.DictReader(stream)
