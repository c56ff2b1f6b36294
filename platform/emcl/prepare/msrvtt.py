"""MSR-VTT and MSRVTT-QA as published.

`train_val_videodatainfo.json` and `test_videodatainfo.json` (or the merged `MSRVTT_data.json`): `videos` with their
official split, `sentences`. Lists of the retrieval splits: `MSRVTT_train.9k.csv`, `MSRVTT_train.7k.csv`,
`MSRVTT_JSFUSION_test.csv`. Questions: `{train,val,test}.jsonl` or `.json`, also with `_qa`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from emcl.errors import UserError
from emcl.prepare.clips import Clip
from emcl.prepare.published import csv_of, find_text, folder_of, json_of

OFFICIAL = {"train": "train", "validate": "val", "test": "test"}
"""Published name of a split -> our name."""
LIST = "the published list of the 1k-A split"


def read(annotations: Path, split: str) -> list[Clip]:
    """Clips of one of the protocols: `1k-A` (9,000 training videos), `7k` (7,010), `1k-A-all` and `official`.

    `1k-A` pairs each test video with the one sentence of the published list, `1k-A-all` with all its sentences.
    """
    folder = folder_of(annotations)
    clips, official = _official(folder)
    if split == "official":
        return list(clips.values())
    if split == "7k":
        train = [name for name, subset in official.items() if subset != "test"]
        if find_text(folder, "MSRVTT_train.7k.csv"):
            train = [row["video_id"] for row in csv_of(folder, "MSRVTT_train.7k.csv", what=LIST)]
    else:
        train = [row["video_id"] for row in csv_of(folder, "MSRVTT_train.9k.csv", what=LIST)]
    chosen = [_as(clips, name, "train") for name in train]
    for row in csv_of(folder, "MSRVTT_JSFUSION_test.csv", what=LIST):
        clip = _as(clips, row["video_id"], "test")
        if split != "1k-A-all":
            clip.captions, clip.empty_captions = [], 0
            clip.add_captions([row["sentence"]])
        chosen.append(clip)
    return chosen


def _official(folder: Path) -> tuple[dict[str, Clip], dict[str, str]]:
    """All videos with their sentences, and their official splits."""
    what = "MSR-VTT's official annotations"
    if find_text(folder, "MSRVTT_data.json"):
        files = [json_of(folder, "MSRVTT_data.json", what=what)]
    else:
        files = [
            json_of(folder, name, what=what) for name in ("train_val_videodatainfo.json", "test_videodatainfo.json")
        ]
    official = {video["video_id"]: video["split"] for file in files for video in file["videos"]}
    unknown = set(official.values()) - set(OFFICIAL)
    if unknown:
        raise UserError(f"{folder}: unknown splits {', '.join(sorted(unknown))}; MSR-VTT has {', '.join(OFFICIAL)}")
    clips = {name: Clip(name, name, OFFICIAL[subset]) for name, subset in official.items()}
    for file in files:
        for item in file["sentences"]:
            if item["video_id"] not in clips:
                raise UserError(f"{folder}: a sentence of {item['video_id']}, which is none of the videos")
            clips[item["video_id"]].add_captions([item["caption"]])
    return clips, official


def _as(clips: dict[str, Clip], name: str, split: str) -> Clip:
    if name not in clips:
        raise UserError(f"{name} of the split's list is none of the official videos")
    known = clips[name]
    return Clip(name, name, split, list(known.captions), empty_captions=known.empty_captions)


def read_qa(annotations: Path, split: str) -> list[Clip]:
    """Questions of the `official` splits; or `by-video`: of the available files, with 4/5 of the videos for training.

    If the official sentences are in the same folder, training videos also get these, to train captioning.
    """
    folder = folder_of(annotations)
    clips = questions_of(folder, lambda number: f"video{number}")
    if split == "by-video":
        for clip in clips:
            clip.split = "test" if _hash(clip.id) % 5 == 0 else "train"
    if find_text(folder, "train_val_videodatainfo.json", "MSRVTT_data.json"):
        known = _official(folder)[0]
        for clip in clips:
            if clip.split == "train" and clip.id in known:
                clip.captions = known[clip.id].captions
    return clips


def questions_of(folder: Path, name_of: Any) -> list[Clip]:
    """Clips with the questions of `{train,val,test}.jsonl` and similar names, in file order; missing files are skipped.

    Args:
        name_of: returns the name of a video from its number.
    """
    clips: dict[tuple[str, str], Clip] = {}
    for split in ("train", "val", "test"):
        names = [f"{split}.jsonl", f"{split}.json", f"{split}_qa.json", f"{split}_qa.jsonl"]
        names += sorted(path.name for path in folder.glob(f"qa_{split}*.jsonl"))
        if find_text(folder, *names) is None:
            continue
        for item in json_of(folder, *names, what="questions"):
            number = item["video_id"]
            name = number if isinstance(number, str) and not number.isdigit() else name_of(int(number))
            clip = clips.setdefault((split, name), Clip(name, name, split))
            clip.qa.append({"question": item["question"], "answer": item["answer"]})
    if not clips:
        raise UserError(f"{folder} holds no questions: train, val, test as .jsonl, .json or _qa.json")
    return list(clips.values())


def answers_known(annotations: Path) -> list[str]:
    """The published answer vocabulary `train_ans2label.json`, in index order."""
    numbers = json_of(annotations, "train_ans2label.json", what="MSRVTT-QA's answers")
    return sorted(numbers, key=numbers.__getitem__)


def share_outside(clips: Iterable[Clip], answers: Iterable[str]) -> float:
    """Share of questions whose answer is not in `answers`."""
    known = set(answers)
    asked = [pair["answer"] for clip in clips for pair in clip.qa]
    return sum(answer not in known for answer in asked) / len(asked)


def _hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16)
