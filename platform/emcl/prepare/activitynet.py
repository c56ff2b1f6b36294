"""ActivityNet Captions as published: `train.json`, `val_1.json`, `val_2.json`, each `{id: {duration, timestamps,
sentences}}`. For retrieval, all sentences of a video are joined to one paragraph."""

from __future__ import annotations

from pathlib import Path

from emcl.prepare.clips import Clip
from emcl.prepare.published import folder_of, json_of, paragraph


def read(annotations: Path, split: str) -> list[Clip]:
    """Clips with the test split `val_1` or `val_2`, as named by the protocol; video files are `v_ID.mp4` or `ID.mp4`.

    With `-moments`, each sentence is a separate clip between its timestamps.
    """
    folder, (test, _, moments) = folder_of(annotations), split.partition("-")
    clips = []
    for subset, name in (("train", "train.json"), ("test", f"{test}.json")):
        for video, item in json_of(folder, name, what="ActivityNet Captions").items():
            identity = video if video.startswith("v_") else f"v_{video}"
            if not moments:
                clips.append(Clip(identity, identity, subset))
                clips[-1].add_captions([paragraph(item["sentences"])])
                continue
            for number, (sentence, (start, end)) in enumerate(zip(item["sentences"], item["timestamps"], strict=True)):
                start, end = sorted((float(start), float(end)))  # a few are published in reverse order
                clips.append(Clip(identity, f"{identity}_{number}", subset, start=start, end=end))
                clips[-1].add_captions([sentence])
    return clips
