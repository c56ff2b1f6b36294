"""The readers of published benchmarks: on the real files, and on files of the published structure with oddities."""

from __future__ import annotations

import csv
import json
import os
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import shared
from emcl.errors import UserError
from emcl.prepare.benchmarks import BENCHMARKS, read_benchmark
from emcl.prepare.clips import Clip
from emcl.prepare.msrvtt import answers_known, share_outside


def read(name: str, annotations: Path, protocol: str | None = None) -> list[Clip]:
    return read_benchmark(name, protocol, annotations)[0]


def counts(clips: list[Clip], *, of: str = "captions") -> dict[str, tuple[int, int]]:
    videos = Counter(clip.split for clip in clips)
    texts: Counter[str] = Counter()
    for clip in clips:
        texts[clip.split] += len(getattr(clip, of))
    return {split: (videos[split], texts[split]) for split in videos}


@pytest.mark.parametrize(
    ("name", "folder", "protocol"),
    [
        ("msrvtt", "msrvtt", "1k-A"),
        ("msrvtt", "msrvtt", "1k-A-all"),
        ("msrvtt", "msrvtt", "7k"),
        ("msrvtt", "msrvtt", "official"),
        ("msvd", "msvd", "official"),
        ("activitynet", "activitynet", "val_1"),
        ("activitynet", "activitynet", "val_2"),
        ("activitynet", "activitynet", "val_1-moments"),
        ("activitynet", "activitynet", "val_2-moments"),
    ],
)
def test_the_real_files_hold_what_is_published(name: str, folder: str, protocol: str) -> None:
    counted = counts(read(name, shared(f"data/{folder}"), protocol))
    assert counted == BENCHMARKS[name].protocols[protocol]


def test_the_real_questions_of_msvd() -> None:
    clips = read("msvd-qa", shared("data/msvd_qa"))
    assert counts(clips, of="qa") == BENCHMARKS["msvd-qa"].protocols["official"]
    assert {clip.file for clip in clips if clip.split == "train"} & {"-4wsuPCjDBc_5_15"}  # a name, not `vid1`


def test_the_real_part_of_didemo() -> None:
    paragraphs = counts(read("didemo", shared("data/didemo")))
    assert paragraphs == {"val": (1065, 1065), "test": (1004, 1004)}
    as_published = read("didemo", shared("data/didemo"), "paragraph-31s")
    assert counts(as_published) == paragraphs and {(clip.start, clip.end) for clip in as_published} == {(0, 31)}
    moments = read("didemo", shared("data/didemo"), "moments")
    assert counts(moments) == {"val": (4180, 4180), "test": (4021, 4021)}
    # 1,094 and 1,037 by the names in the descriptions, some of which are one video under two
    videos = {split: {clip.file for clip in moments if clip.split == split} for split in ("val", "test")}
    assert {split: len(names) for split, names in videos.items()} == {"val": 1065, "test": 1004}
    names = {
        split: {clip.id.rpartition("_")[0] for clip in moments if clip.split == split} for split in ("val", "test")
    }
    assert {split: len(ids) for split, ids in names.items()} == {"val": 1094, "test": 1037}
    assert all(0 <= clip.start < clip.end <= 30 for clip in moments if clip.start is not None and clip.end is not None)


def test_the_real_questions_of_msrvtt() -> None:
    folder = shared("data/msrvtt")
    clips = read("msrvtt-qa", folder)
    assert counts(clips, of="qa") == {"val": (248, 6080)}
    answers = answers_known(folder)
    assert len(answers) == 1500
    assert share_outside(clips, answers) == pytest.approx(0.072, abs=5e-4)
    split_clips = read("msrvtt-qa", folder, "by-video")
    by_split = {split: {clip.id for clip in split_clips if clip.split == split} for split in ("train", "test")}
    assert not by_split["train"] & by_split["test"]
    assert len(by_split["train"]) / 248 == pytest.approx(0.8, abs=0.05)
    assert all(bool(clip.captions) == (clip.split == "train") for clip in split_clips)


def test_1ka_pairs_the_sentences_of_its_list_most_of_which_are_official() -> None:
    folder = shared("data/msrvtt")
    pairs = {clip.id: clip.captions for clip in read("msrvtt", folder, "1k-A") if clip.split == "test"}
    with (folder / "MSRVTT_JSFUSION_test.csv").open(newline="") as stream:
        listed = {row["video_id"]: [row["sentence"]] for row in csv.DictReader(stream)}
    assert pairs == listed
    official = {clip.id: set(clip.captions) for clip in read("msrvtt", folder, "official")}
    # 965 stand there word for word, 988 when spaces do not count
    assert sum(sentence in official[name] for name, (sentence,) in pairs.items()) == 988
    assert not pairs.keys() & {clip.id for clip in read("msrvtt", folder, "1k-A") if clip.split == "train"}


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def msrvtt_file(split_of: dict[str, str], sentences: list[tuple[str, str]]) -> dict[str, Any]:
    videos = [
        {"category": 9, "url": "https://www.youtube.com/watch?v=x", "video_id": name, "start time": 1.0,
         "end time": 9.5, "split": split, "id": number}
        for number, (name, split) in enumerate(split_of.items())
    ]  # fmt: skip
    texts = [{"caption": text, "video_id": name, "sen_id": number} for number, (name, text) in enumerate(sentences)]
    return {"info": {"year": "2016"}, "videos": videos, "sentences": texts}


SPLITS = {"video0": "train", "video1": "validate", "video2": "test"}
SENTENCES = [
    ("video2", "a  man   with two spaces"),
    ("video0", "ein Hündchen läuft 🐕"),
    ("video0", "   "),
    ("video0", "ein Hündchen läuft 🐕"),
]


def check_msrvtt(clips: list[Clip]) -> None:
    by_name = {clip.id: clip for clip in clips}
    assert {name: clip.split for name, clip in by_name.items()} == {
        "video0": "train",
        "video1": "val",
        "video2": "test",
    }
    assert by_name["video0"].captions == ["ein Hündchen läuft 🐕"] * 2  # repeated, as published
    assert by_name["video0"].empty_captions == 1
    assert by_name["video1"].captions == []
    assert by_name["video2"].captions == ["a man with two spaces"]


def test_the_merged_file_of_msrvtt(tmp_path: Path) -> None:
    write_json(tmp_path / "MSRVTT_data.json", msrvtt_file(SPLITS, SENTENCES))
    check_msrvtt(read("msrvtt", tmp_path, "official"))


def test_zipped_files_of_msrvtt_in_a_folder_of_the_archive(tmp_path: Path) -> None:
    for archive, name, splits in (
        ("train_val_annotation.zip", "train_val_videodatainfo.json", ("train", "validate")),
        ("test_videodatainfo.json.zip", "test_videodatainfo.json", ("test",)),
    ):
        chosen = {video: split for video, split in SPLITS.items() if split in splits}
        content = msrvtt_file(chosen, [pair for pair in SENTENCES if pair[0] in chosen])
        with zipfile.ZipFile(tmp_path / archive, "w") as zipped:
            zipped.writestr(f"folder/{name}", json.dumps(content))
    check_msrvtt(read("msrvtt", tmp_path, "official"))


QUESTIONS = [
    {"answer": "dog", "category_id": 14, "id": 0, "question": "what runs?", "video_id": 0},
    {"answer": "two", "category_id": 14, "id": 1, "question": "how many  dogs are there?", "video_id": 0},
    {"answer": "café", "category_id": 3, "id": 2, "question": "where is it?", "video_id": 2},
]


@pytest.mark.parametrize("name", ["{}_qa.json", "{}.json", "{}.jsonl"])
def test_msrvtt_qa_of_three_files(name: str, tmp_path: Path) -> None:
    for split, number in (("train", 0), ("test", 2)):
        items = [item for item in QUESTIONS if item["video_id"] == number]
        path = tmp_path / name.format(split)
        if path.suffix == ".jsonl":  # where videos are named, not numbered
            lines = [{**item, "video_id": f"video{item['video_id']}", "answer_type": "what"} for item in items]
            path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        else:
            write_json(path, items)
    train, test = read("msrvtt-qa", tmp_path)
    assert (train.id, train.split, test.id, test.split) == ("video0", "train", "video2", "test")
    assert [pair["answer"] for pair in train.qa] == ["dog", "two"]
    assert test.qa == [{"question": "where is it?", "answer": "café"}]


LSMDC_LINES = {
    "training": [
        "0001_American_Beauty_00.00.51.926-00.00.54.129\t00:00:51,926\t00:00:54,129\t1\t2\tSomeone  waits.",
        "0001_American_Beauty_00.01.00.000-00.01.02.000\t1\t2\t1\t2\ta tab\tin the sentence",
        "",
    ],
    "val": ["0002_As_Good_00.00.01.000-00.00.02.000\t1\t2\t1\t2\tSOMEONE\u2019s café."],
}


def write_lsmdc(folder: Path) -> None:
    for name, lines in LSMDC_LINES.items():
        (folder / f"LSMDC16_annos_{name}.csv").write_text("\r\n".join(lines), encoding="utf-8")
    (folder / "LSMDC16_challenge_1000_publictect.csv").write_text("m_1-2\t1\t2\t1\t2\tend\n")


def test_lsmdc(tmp_path: Path) -> None:
    write_lsmdc(tmp_path)
    first, second, val, test = read("lsmdc", tmp_path)
    assert first.file == first.id == "0001_American_Beauty_00.00.51.926-00.00.54.129"
    assert (first.captions, first.split) == (["Someone waits."], "train")
    assert second.captions == ["a tab in the sentence"]
    assert (val.captions, val.split) == (["SOMEONE\u2019s café."], "val")
    assert (test.captions, test.split) == (["end"], "test")


def test_a_line_of_lsmdc_with_too_few_columns_is_named(tmp_path: Path) -> None:
    write_lsmdc(tmp_path)
    (tmp_path / "LSMDC16_annos_val.csv").write_text("a\tb\tc\n")
    with pytest.raises(UserError, match=r"LSMDC16_annos_val.csv, line 1: 3 columns"):
        read("lsmdc", tmp_path)


def test_vatex(tmp_path: Path) -> None:
    def items(*names: str) -> list[dict[str, Any]]:
        return [{"videoID": name, "enCap": [f"{name} one", "  two  words "], "chCap": ["一"]} for name in names]

    write_json(tmp_path / "vatex_training_v1.0.json", items("Ptf_2VRj-V0_000122_000132"))
    write_json(tmp_path / "vatex_validation_v1.0.json", items("a_000000_000010", "b_000000_000010"))
    train, *val = read("vatex", tmp_path)
    assert train.captions == ["Ptf_2VRj-V0_000122_000132 one", "two words"]
    assert [clip.split for clip in val] == ["val", "val"]
    for split, name in zip(("train", "val", "test"), [train.id, *(clip.id for clip in val)], strict=True):
        (tmp_path / f"{split}_list.txt").write_text(name + "\n")
    assert [clip.split for clip in read("vatex", tmp_path, "lists")] == ["train", "val", "test"]


def test_activitynet_ids_with_and_without_v(tmp_path: Path) -> None:
    item = {"duration": 55.15, "timestamps": [[0.28, 55.15], [54.32, 13.79]], "sentences": ["One.", "  Two  words. "]}
    write_json(tmp_path / "train.json", {"v_uqiMw7tQ1Cc": item})
    write_json(tmp_path / "val_1.json", {"bXdq2zI1Ms0": item})
    train, test = read("activitynet", tmp_path)
    assert (train.file, test.file) == ("v_uqiMw7tQ1Cc", "v_bXdq2zI1Ms0")
    assert train.captions == ["One. Two words."]
    moments = read("activitynet", tmp_path, "val_1-moments")
    assert [(clip.start, clip.end, clip.captions) for clip in moments[:2]] == [
        (0.28, 55.15, ["One."]), (13.79, 54.32, ["Two words."]),
    ]  # fmt: skip


@pytest.mark.parametrize("python2", [False, True])
def test_captions_of_a_pickle_are_read_and_its_code_is_not_run(python2: bool, tmp_path: Path) -> None:
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}_list.txt").write_text(f"{split}_1_2\n")
    old = b"\x80\x02}(U\x09train_1_2](](U\x01aU\x03doge](U\x01aeeu."  # Python 2's strings, as the published file has
    new = pickle.dumps({"train_1_2": [["a", "dog"], ["a"]]})
    (tmp_path / "raw-captions.pkl").write_bytes(old if python2 else new)
    assert read("msvd", tmp_path)[0].captions == ["a dog", "a"]

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path}/ran",)

    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"train_1_2": Payload()}))
    with pytest.raises(UserError, match="no plain pickle of captions: it wants"):
        read("msvd", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_folder_without_the_published_files_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        read(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_protocol_names_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1k-A, 1k-A-all, 7k, official"):
        read("msrvtt", tmp_path, "1k-B")
