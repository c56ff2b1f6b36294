"""DiDeMo as published: `{train,val,test}_data.json`, a list of `{video, description, times, ...}`.

For retrieval, all descriptions of a video are joined to one paragraph for its first 30 seconds, which are annotated, or
the 31 that EMCL-Net's code takes. Files often have another extension than in the annotations, and some descriptions
name them without one, so a video is identified by its stem (the 1,094 names of the validation split are 1,065 videos).
`*_list.txt`, if present, lists the videos of a split.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path, PurePosixPath
from typing import Any

from emcl.errors import UserError
from emcl.prepare.clips import Clip
from emcl.prepare.published import find_text, folder_of, json_of, lines_of, paragraph

SECONDS = {"paragraph": 30.0, "paragraph-31s": 31.0}
SEGMENT = 5.0
"""Seconds per segment; `times` are the first and the last segment that an annotator chose."""


def read(annotations: Path, split: str) -> list[Clip]:
    """Clips of the splits whose files exist, in one of SECONDS, or `moments` with one clip per description."""
    folder = folder_of(annotations)
    clips = []
    for subset in ("train", "val", "test"):
        if find_text(folder, f"{subset}_data.json") is None:
            continue
        items = json_of(folder, f"{subset}_data.json", what="DiDeMo's descriptions")
        if split == "moments":
            clips += [_moment(item, subset) for item in items]
            continue
        texts: dict[str, list[str]] = {}
        for item in items:
            texts.setdefault(_stem(item["video"]), []).append(item["description"])
        listed = set(texts)
        if find_text(folder, f"{subset}_list.txt"):
            listed = {_stem(name) for name in lines_of(folder, f"{subset}_list.txt", what="DiDeMo's split")}
        for name in (name for name in texts if name in listed):
            clips.append(Clip(name, name, subset, start=0.0, end=SECONDS[split]))
            clips[-1].add_captions([paragraph(texts[name])])
    if not clips:
        raise UserError(f"{folder} holds none of DiDeMo's train_data.json, val_data.json, test_data.json")
    return clips


def _moment(item: dict[str, Any], subset: str) -> Clip:
    """A description, with the segments of the video that most annotators chose."""
    (first, last), _ = Counter(map(tuple, item["times"])).most_common(1)[0]
    identity = f"{item['video']}_{item['annotation_id']}"
    clip = Clip(_stem(item["video"]), identity, subset, start=SEGMENT * first, end=SEGMENT * (last + 1))
    clip.add_captions([item["description"]])
    return clip


def _stem(name: str) -> str:
    """The name without extension; some published names end with a dot and have none."""
    return name.removesuffix(".") if name.endswith(".") else PurePosixPath(name).stem
