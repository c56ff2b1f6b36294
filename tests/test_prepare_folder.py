"""One's own videos and MSR-VTT's published files to shards, by the commands of the README."""

from __future__ import annotations

import csv
import json
import tarfile
from pathlib import Path

import pytest

from conftest import shared
from emcl.cli import main
from emcl.data.shards import open_shards
from emcl.errors import UserError
from emcl.prepare.folder import prepare_folder, read_table


@pytest.fixture
def videos(sample_shards: Path, tmp_path: Path) -> Path:
    """A folder with three clips, one of them in a subfolder, and a broken file."""
    shards = open_shards(f"{sample_shards}/val-000000.tar")
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    for name, row in zip(("a.mp4", "b.mp4", "sub/c.mp4"), shards.rows, strict=False):
        (folder / name).write_bytes(shards.read(row))
    (folder / "broken.mp4").write_bytes(b"no video at all")
    return folder


def write_csv(path: Path, rows: list[list[str]], header: str = "file,caption,split") -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header.split(","), *rows])
    return path


ROWS = [
    ["a.mp4", "a first caption", "train"],
    ["a.mp4", 'a second, with a comma and "quotes"', "train"],
    ["sub/c.mp4", "ein Hündchen läuft", "test"],
    ["broken.mp4", "nothing", "train"],
    ["gone.mp4", "nothing", "train"],
]


@pytest.mark.parametrize("as_tar", [False, True])
def test_a_folder_or_tar_and_a_csv_become_shards(as_tar: bool, videos: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    source = videos
    if as_tar:
        source = tmp_path / "videos.tar"
        with tarfile.open(source, "w") as tar:
            for path in videos.rglob("*.mp4"):
                tar.add(path, f"./{path.relative_to(videos)}")
    table = write_csv(tmp_path / "captions.csv", ROWS)
    out = tmp_path / "out"
    command = ["prepare", "folder", "--videos", str(source), "--annotations", str(table), "--out", str(out)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "1 train, 1 test" in said and "gone.mp4" in said and "broken.mp4" in said
    (row,) = open_shards(f"{out}/train-*.tar").rows
    assert row.sample.captions == ["a first caption", 'a second, with a comma and "quotes"']
    (row,) = open_shards(f"{out}/test-*.tar").rows
    assert row.sample.captions == ["ein Hündchen läuft"]
    assert json.loads((out / "report.json").read_text())["missing"] == ["gone.mp4"]
    assert main(command) == 2
    assert "holds shards already" in capsys.readouterr().err


def test_parts_of_a_file_are_samples_of_their_own(videos: Path, tmp_path: Path) -> None:
    rows = [["a.mp4", "the start", "0", "1"], ["a.mp4", "the end", "1", "2"]]
    table = write_csv(tmp_path / "parts.csv", rows, "file,caption,start,end")
    prepare_folder(videos, table, tmp_path / "out", progress=False)
    samples = [row.sample for row in open_shards(str(tmp_path / "out")).rows]
    assert [(sample.start, sample.end) for sample in samples] == [(0, 1), (1, 2)]


def test_json_lines_with_lists_of_captions(videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    item = {"file": "a.mp4", "captions": ["one", "two"], "qa": [["what?", "this"]]}
    table.write_text(json.dumps(item) + "\n")
    (clip,) = read_table(table)
    assert clip.captions == ["one", "two"]
    assert clip.qa == [{"question": "what?", "answer": "this"}]


@pytest.mark.parametrize(
    ("rows", "header", "named"),
    [
        ([["a.mp4", "x"]], "path,caption", "must name `file` and `caption`"),
        ([["", "x"]], "file,caption", "line 2: no `file`"),
        ([["a.mp4", "x", "soon"]], "file,caption,start", "line 2: start and end are seconds"),
        ([], "file,caption", "lists no clip"),
        ([["gone.mp4", "x"]], "file,caption", "none of the 1 clips"),
        ([["../outside.mp4", "x"]], "file,caption", "none of the 1 clips"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    rows: list[list[str]], header: str, named: str, videos: Path, tmp_path: Path
) -> None:
    (tmp_path / "outside.mp4").write_bytes((videos / "a.mp4").read_bytes())
    table = write_csv(tmp_path / "table.csv", rows, header)
    with pytest.raises(UserError, match=named):
        prepare_folder(videos, table, tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").glob("*.tar"))


def test_every_sentence_of_the_1ka_test_videos(tmp_path: Path) -> None:
    table = tmp_path / "msrvtt_1ka.csv"
    options = ["--annotations", str(shared("data/msrvtt")), "--out", str(table), "--every-test-sentence"]
    assert main(["prepare", "msrvtt-csv", *options]) == 0
    with table.open(newline="") as stream:
        test = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    assert len({row["file"] for row in test}) == 1000
    assert len(test) == 20_000


def test_msrvtt_1ka_from_the_published_files(tmp_path: Path) -> None:
    table = tmp_path / "msrvtt_1ka.csv"
    assert main(["prepare", "msrvtt-csv", "--annotations", str(shared("data/msrvtt")), "--out", str(table)]) == 0
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len({row["file"] for row in rows if row["split"] == "train"}) == 9000
    assert sum(row["split"] == "train" for row in rows) == 180_000
    assert len({row["file"] for row in rows if row["split"] == "test"}) == 1000
    assert sum(row["split"] == "test" for row in rows) == 1000
    assert not {row["file"] for row in rows if row["split"] == "train"} & {
        row["file"] for row in rows if row["split"] == "test"
    }
