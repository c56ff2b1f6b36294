"""Videos and annotations to shards, by the commands of the README; killed, in parts, and verified."""

from __future__ import annotations

import csv
import io
import json
import random
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import av
import numpy as np
import pytest

from conftest import emcl_command, launch_environment
from emcl.cli import main
from emcl.data.decode import decode
from emcl.data.shards import open_shards
from emcl.errors import UserError
from emcl.prepare.clips import Report
from emcl.prepare.sharding import Encoding, Options, prepare_shards
from emcl.prepare.table import read_table
from emcl.prepare.videos import Videos, reencode
from forked import start_program


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
    before = contents(out)
    assert main(command) == 0  # all is there: nothing is written again
    assert contents(out) == before
    (out / ".prepare" / "plan").unlink()
    assert main(command) == 2
    assert "holds shards already" in capsys.readouterr().err


def test_parts_of_a_file_are_samples_of_their_own(videos: Path, tmp_path: Path) -> None:
    rows = [["a.mp4", "the start", "0", "1"], ["a.mp4", "the end", "1", "2"]]
    table = write_csv(tmp_path / "parts.csv", rows, "file,caption,start,end")
    prepare(videos, table, tmp_path / "out", keep=True)
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
        prepare(videos, table, tmp_path / "out", allow_missing=True)
    assert not list((tmp_path / "out").glob("*.tar"))


def prepare(source: Path, table: Path, out: Path, **options: object) -> Report | None:
    encoding = Encoding(keep=bool(options.pop("keep", False)))
    settings = Options(encoding=encoding, processes=1, progress=False, **options)  # type: ignore[arg-type]
    return prepare_shards(read_table(table), Videos(source), out, settings, source="folder")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


@pytest.fixture
def many(sample_shards: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder of 16 videos, and their table."""
    folder = tmp_path / "many"
    folder.mkdir()
    rows = []
    shards = open_shards(f"{sample_shards}/val-000000.tar::{sample_shards}/test-*.tar")
    for row in shards.rows[:16]:
        name = f"{row.sample.id}.mp4"
        (folder / name).write_bytes(shards.read(row))
        rows.append([name, row.sample.captions[0], row.sample.split])
    return folder, write_csv(tmp_path / "many.csv", rows)


def test_videos_are_re_encoded_small_slow_and_cut_to_the_clip(videos: Path, tmp_path: Path) -> None:
    rows = [["a.mp4", "the start", "0", "1"], ["a.mp4", "all", "", ""]]
    table = write_csv(tmp_path / "parts.csv", rows, "file,caption,start,end")
    prepare(videos, table, tmp_path / "out")
    shards = open_shards(str(tmp_path / "out"))
    lengths = []
    for row in shards.rows:
        assert (row.sample.start, row.sample.end) == (None, None)
        with av.open(io.BytesIO(shards.read(row))) as container:
            stream = container.streams.video[0]
            assert stream.codec_context.name == "h264" and stream.average_rate == 3
            assert min(stream.width, stream.height) == 112  # never enlarged
            lengths.append(len(list(container.decode(video=0))))
    with av.open(str(videos / "a.mp4")) as container:
        seconds = container.duration / 1_000_000
    assert lengths == [3, round(3 * seconds)]


def test_a_re_encoded_video_shows_the_same_at_the_same_time(videos: Path, tmp_path: Path) -> None:
    original = (videos / "a.mp4").read_bytes()
    small = reencode(original, short_side=256, fps=3.0)
    first, second = (decode(video, frames=4, size=32).astype(float) for video in (original, small))
    # the frames are up to a sixth of a second apart; another video of the folder is far off
    assert np.abs(first - second).mean() < 8
    other = decode((videos / "b.mp4").read_bytes(), frames=4, size=32).astype(float)
    assert np.abs(first - other).mean() > 16


def test_parts_make_what_one_call_makes(many: tuple[Path, Path], tmp_path: Path) -> None:
    prepare(*many, tmp_path / "whole", shard_size=3)
    assert prepare(*many, tmp_path / "parts", shard_size=3, part=(1, 3)) is None
    assert prepare(*many, tmp_path / "parts", shard_size=3, part=(3, 3)) is None
    assert not (tmp_path / "parts" / "index.json").exists()
    assert prepare(*many, tmp_path / "parts", shard_size=3, part=(2, 3)) is not None
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_other_settings_do_not_go_on_with_shards_that_are_there(many: tuple[Path, Path], tmp_path: Path) -> None:
    prepare(*many, tmp_path / "out", shard_size=3)
    with pytest.raises(UserError, match="other clips, videos or settings"):
        prepare(*many, tmp_path / "out", shard_size=3, keep=True)


def test_kills_at_ten_random_moments_leave_the_same_shards(many: tuple[Path, Path], tmp_path: Path) -> None:
    folder, table = many
    command = ["prepare", "folder", "--videos", str(folder), "--annotations", str(table), "--shard-size", "1"]
    command += ["--processes", "1", "--out"]
    assert emcl_command(*command, str(tmp_path / "whole"), cwd=tmp_path).returncode == 0
    out, rng, killed_at = tmp_path / "killed", random.Random(0), []
    for _ in range(10):
        before = len(list(out.glob("*.tar")))
        log = tmp_path / "log"
        process = start_program("emcl.cli", *command, str(out), env=launch_environment(), cwd=tmp_path, stdout=log)
        # some while it starts, the others after a shard more or two and a moment, in the midst of the next
        wanted, patience = before + rng.randrange(3), time.monotonic() + 60
        while process.poll() is None and len(list(out.glob("*.tar"))) < wanted and time.monotonic() < patience:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.02))
        if process.poll() is None:
            process.kill_session()
            killed_at.append(len(list(out.glob("*.tar"))))
        process.wait()
    assert len(killed_at) >= 5 and killed_at[-1] > 0, killed_at
    assert emcl_command(*command, str(tmp_path / "killed"), cwd=tmp_path).returncode == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_verify_finds_a_changed_a_missing_and_a_strange_shard(
    many: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prepare(*many, out, shard_size=3)
    assert main(["verify", str(out), "--decode"]) == 0
    assert "every shard is as it was written" in capsys.readouterr().out
    first, second, *_ = sorted(out.glob("*.tar"))
    torn = bytearray(first.read_bytes())
    torn[600] ^= 1
    first.write_bytes(torn)
    second.rename(out / "strange-000000.tar")
    assert main(["verify", str(out)]) == 2
    said = capsys.readouterr().err
    for line in (f"{first.name}: its checksum", f"{second.name}: missing", "strange-000000.tar: not in index.json"):
        assert line in said


def test_missing_videos_of_a_benchmark_are_an_error_unless_allowed(
    many: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = many
    names = sorted(path.stem for path in folder.glob("*.mp4"))[:3]
    annotations = tmp_path / "msvd"
    annotations.mkdir()
    for split, listed in (("train", [names[0], "gone_1_2"]), ("val", [names[1]]), ("test", [names[2]])):
        (annotations / f"{split}_list.txt").write_text("\n".join(listed) + "\n\n")
    (annotations / "captions_msvd.json").write_text(json.dumps({names[0]: ["a  b", " "], names[2]: ["c"]}))
    command = ["prepare", "msvd", "--annotations", str(annotations), "--videos", str(folder), "--keep"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 2
    assert "1 of 4 videos are not there, the first gone_1_2" in capsys.readouterr().err
    assert main([*command, "--allow-missing", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "1 train, 1 val, 1 test" in said and "1 empty captions left out" in said
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["missing"] == ["gone_1_2"] and report["without_caption"] == [names[1]]
    assert len(report["unannotated"]) == 13
    (row,) = open_shards(f"{tmp_path}/out/train-*.tar").rows
    assert row.sample.captions == ["a b"] and row.sample.source == "msvd"


def test_ids_that_differ_in_a_dot_alone_stay_two_samples(videos: Path, tmp_path: Path) -> None:
    rows = [["a.mp4", "one", "x.y"], ["b.mp4", "two", "x_y"]]
    table = write_csv(tmp_path / "ids.csv", rows, "file,caption,id")
    prepare(videos, table, tmp_path / "out", keep=True)
    assert [row.sample.id for row in open_shards(str(tmp_path / "out")).rows] == ["x.y", "x_y"]


def test_the_processes_that_encode_do_without_pytorch() -> None:
    """Its import takes longer than ten clips."""
    code = "import emcl.prepare.sharding, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
