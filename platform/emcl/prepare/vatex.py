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
    """Clips of the published files (`official`), or of the lists `{train,val,test}_list.txt` (`lists`).

    Retrieval papers train on the training set and split the validation set in two, with their own lists.
    """
    folder = folder_of(annotations)
    captions: dict[str, list[str]] = {}
    published: dict[str, str] = {}
    for subset, names in FILES.items():
        if find_text(folder, *names) is None and (subset == "test" or split == "lists"):
            continue
        for item in json_of(folder, *names, what="VATEX's annotations"):
            published[item["videoID"]] = subset
            captions[item["videoID"]] = item.get("enCap", [])
    if split == "lists":
        listed = [
            (name, subset)
            for subset in ("train", "val", "test")
            for name in lines_of(folder, f"{subset}_list.txt", what="a list of the retrieval split")
        ]
    else:
        listed = list(published.items())
    clips = []
    for name, subset in listed:
        clip = Clip(name, name, subset)
        clip.add_captions(captions.get(name, []))
        clips.append(clip)
    return clips
