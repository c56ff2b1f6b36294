"""ActivityNet Captions as published: `train.json`, `val_1.json`, `val_2.json`, each `{id: {duration, timestamps,
sentences}}`. For retrieval all sentences of a video make one paragraph."""

from __future__ import annotations

from pathlib import Path

from emcl.prepare.clips import Clip
from emcl.prepare.published import folder_of, json_of, paragraph


def read(annotations: Path, split: str) -> list[Clip]:
    """Clips whose test is `val_1` or `val_2`, by the name of the protocol; videos lie as `v_ID.mp4` or `ID.mp4`.

    With `-moments` each sentence is a clip of its own, between its timestamps.
    """
    folder, (test, _, moments) = folder_of(annotations), split.partition("-")
    clips = []
    for part, name in (("train", "train.json"), ("test", f"{test}.json")):
        for video, item in json_of(folder, name, what="ActivityNet Captions").items():
            identity = video if video.startswith("v_") else f"v_{video}"
            if not moments:
                clips.append(Clip(identity, identity, part))
                clips[-1].add_captions([paragraph(item["sentences"])])
                continue
            for number, (sentence, (start, end)) in enumerate(zip(item["sentences"], item["timestamps"], strict=True)):
                start, end = sorted((float(start), float(end)))  # a few are published the other way round
                clips.append(Clip(identity, f"{identity}_{number}", part, start=start, end=end))
                clips[-1].add_captions([sentence])
    return clips
