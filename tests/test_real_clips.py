"""Real clips, H.264 in MP4 and AVI: the shard writer, PyAV, the launch command, and a tiny model that learns them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import emcl
from conftest import ROOT, TINY, launch, shared
from emcl.prepare.sharding import Encoding, Options, prepare_shards
from emcl.prepare.table import read_table
from emcl.prepare.videos import Videos
from emcl.search.index import VideoIndex
from emcl.search.windows import Windows


def ten(out: Path) -> Path:
    """The folder of videos, whose ten samples are now shards in `out`."""
    videos = shared("data/videos")
    clips = read_table(videos / "annotations.json")
    options = Options(encoding=Encoding(keep=True), processes=1, progress=False)
    report = prepare_shards(clips, Videos(videos), out, options, source="folder")
    assert report is not None and report.written == {"train": 10}
    return videos


@pytest.mark.slow
def test_a_tiny_model_learns_all_tasks_of_the_ten_by_heart(tmp_path: Path) -> None:
    videos = ten(tmp_path / "shards")
    done = launch(
        "--task", "retrieval,captioning,msrvtt_qa", "data.generate=false", f"data.train={tmp_path}/shards",
        "data.val=null", f"data.test={tmp_path}/shards", "data.batch_size=10", f"model.name={TINY}",
        "data.image_size=32", "data.frames=4", "optim.epochs=150", "optim.lr=3e-3", "optim.backbone_lr=3e-3",
        "optim.weight_decay=0", "checkpoint.every_steps=1000", "name=ten", "tracking.enabled=false",
        "tasks.captioning.label_smoothing=0", "tasks.captioning.dropout=0", "tasks.msrvtt_qa.dropout=0",
        "tasks.captioning.captions_per_video=3", cwd=tmp_path, ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((tmp_path / "runs/ten/scores-test.json").read_text())["tasks"]
    assert scores["msrvtt_qa"]["metrics"]["accuracy"] == 100
    assert scores["retrieval"]["metrics"]["text_to_video/R@1"] == 100
    assert scores["retrieval"]["metrics"]["video_to_text/R@1"] == 100
    references = {item["id"]: item["captions"] for item in json.loads((videos / "annotations.json").read_text())}
    for item in json.loads((tmp_path / "runs/ten/captions-test.json").read_text()):
        assert item["caption"] in [" ".join(text.lower().split()) for text in references[item["image_id"]]]
    finds_its_clips(tmp_path / "runs/ten", videos, tmp_path)


def finds_its_clips(run: Path, videos: Path, folder: Path) -> None:
    """Each of the ten by its captions, in an index of their files; two are scenes of one file."""
    clips = json.loads((videos / "annotations.json").read_text())
    (folder / "nine").mkdir()
    for name in {clip["file"] for clip in clips}:
        (folder / "nine" / name).write_bytes((videos / name).read_bytes())
    index = VideoIndex(folder / "index", emcl.load(run, device="cpu"), windows=Windows())
    index.update(folder / "nine")
    for clip in clips:
        for caption in clip["captions"]:
            hit = index.search(caption, top=1)[0]
            assert hit.path == clip["file"], caption
            if "start" in clip:
                assert hit.start == pytest.approx(clip["start"], abs=1), caption
            if clip["id"] == "tomato":  # the other's end is said to be at 5 s, but the cut is at 6.2
                assert hit.end == pytest.approx(clip["end"], abs=1), caption


@pytest.mark.slow
def test_the_whole_way_from_files_to_a_report(tmp_path: Path) -> None:
    """The nineteen clips by the script of docs/msrvtt.md, a slice of its training."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [
        sys.executable, "benchmarks/whole_way.py", "clips", "--annotations", str(shared("data/msrvtt")),
        "--videos", str(shared("data/videos")), "--out", str(tmp_path), "optim.max_steps=3", "tracking.enabled=false",
        f"model.name={TINY}", "data.image_size=32", "data.frames=3",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "every shard is as it was written" in done.stdout
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Every inference option" in page and "video7014" in page
    scores = json.loads((tmp_path / "runs/run/scores-test.json").read_text())
    assert scores["samples"] == 20  # two samples are parts of one of the nineteen files
    assert "230 texts x 20 videos" in scores["tasks"]["retrieval"]["protocol"]
