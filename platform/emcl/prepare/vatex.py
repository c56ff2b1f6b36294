"""VATEX as published: `vatex_training_v1.0.json`, `vatex_validation_v1.0.json`, `vatex_public_test_english_v1.1.json`,
each a list of `{videoID, enCap, chCap}`; `videoID` ends with the clip's start and end in seconds."""

from __future__ import annotations

from pathlib import Path

from emcl.prepare.clips import Clip
from emcl.prepare.published import find_text, folder_of, json_of, lines_of

FILES = {
    "train": ("vatex_training_v1.0.json",),
    "val": ("vatex_validation_v1.0.json",),
    "test": ("vatex_public_test_english_v1.1.json", "vatex_public_test_english_v1.0.json"),
}


def read(annotations: Path, split: str) -> list[Clip]:
    """Clips of the published files (`official`), or by the lists `{train,val,test}_list.txt` (`lists`).

    Retrieval papers train on the training part and split the validation part in two by lists of their own.
    """
    folder = folder_of(annotations)
    captions: dict[str, list[str]] = {}
    published: dict[str, str] = {}
    for part, names in FILES.items():
        if find_text(folder, *names) is None and (part == "test" or split == "lists"):
            continue
        for item in json_of(folder, *names, what="VATEX's annotations"):
            published[item["videoID"]] = part
            captions[item["videoID"]] = item.get("enCap", [])
    if split == "lists":
        parts = [
            (name, part)
            for part in ("train", "val", "test")
            for name in lines_of(folder, f"{part}_list.txt", what="a list of the retrieval split")
        ]
    else:
        parts = list(published.items())
    clips = []
    for name, part in parts:
        clip = Clip(name, name, part)
        clip.add_captions(captions.get(name, []))
        clips.append(clip)
    return clips
