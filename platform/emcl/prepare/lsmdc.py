"""LSMDC as published: `LSMDC16_annos_training.csv`, `..._val.csv`, `LSMDC16_challenge_1000_publictect.csv`.

Tab-separated, no header, six columns: clip, start and end (aligned), start and end (extracted), sentence. The clip
`0001_American_Beauty_00.00.51.926-00.00.54.129` is in the folder `0001_American_Beauty`.
"""

from __future__ import annotations

from pathlib import Path

from emcl.errors import UserError
from emcl.prepare.clips import Clip
from emcl.prepare.published import folder_of, text_of

FILES = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": "LSMDC16_challenge_1000_publictect.csv",
}
COLUMNS = 6


def read(annotations: Path, split: str) -> list[Clip]:
    """Clips of the published split; tabs within a sentence are kept."""
    folder = folder_of(annotations)
    clips: dict[tuple[str, str], Clip] = {}
    for subset, name in FILES.items():
        for number, line in enumerate(text_of(folder, name, what="LSMDC's annotations").split("\n"), 1):
            if not line.strip():
                continue
            cells = line.rstrip("\r").split("\t", COLUMNS - 1)
            if len(cells) < COLUMNS:
                raise UserError(f"{folder / name}, line {number}: {len(cells)} columns, LSMDC's files have {COLUMNS}")
            clip = clips.setdefault((subset, cells[0].strip()), Clip(cells[0].strip(), cells[0].strip(), subset))
            clip.add_captions([cells[-1]])
    return list(clips.values())
