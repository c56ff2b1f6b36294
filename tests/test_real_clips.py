"""Real clips, H.264 in MP4 and AVI: the shard writer, PyAV, the launch command, and a tiny model that learns them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, TINY, launch, shared
from emcl.prepare.shards import Encoding, Options, prepare_shards
from emcl.prepare.table import read_table
from emcl.prepare.videos import Videos


def ten(out: Path) -> Path:
    """The folder of videos, whose ten samples are now shards in `out`."""
    videos = shared("data/videos")
    clips = read_table(videos / "annotations.json")
    options = Options(encoding=Encoding(keep=True), processes=1, progress=False)
    report = prepare_shards(clips, Videos(videos), out, options, source="folder")
    assert report is not None and report.written == {"train": 10}
    return videos


@pytest.mark.slow
def test_a_tiny_model_retrieves_all_ten_in_both_directions(tmp_path: Path) -> None:
    ten(tmp_path / "shards")
    done = launch(
        "--task", "retrieval", "data.generate=false", f"data.train={tmp_path}/shards", "data.val=null",
        f"data.test={tmp_path}/shards", "data.batch_size=10", "optim.epochs=80", "checkpoint.every_steps=1000",
        "optim.lr=1e-3", "optim.clip_lr=1e-3", "name=ten", "tracking.enabled=false",
        cwd=tmp_path, ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((tmp_path / "runs/ten/scores-test.json").read_text())["tasks"]["retrieval"]["metrics"]
    assert metrics["text_to_video/R@1"] == 100
    assert metrics["video_to_text/R@1"] == 100


@pytest.mark.slow
def test_a_tiny_model_learns_all_tasks_of_the_ten_by_heart(tmp_path: Path) -> None:
    videos = ten(tmp_path / "shards")
    done = launch(
        "--task", "retrieval,captioning,msrvtt_qa", "data.generate=false", f"data.train={tmp_path}/shards",
        "data.val=null", f"data.test={tmp_path}/shards", "data.batch_size=10", "optim.epochs=150",
        "checkpoint.every_steps=1000", "optim.lr=1e-3", "optim.clip_lr=1e-3", "name=ten", "tracking.enabled=false",
        "tasks.captioning.label_smoothing=0", "tasks.captioning.dropout=0", "tasks.msrvtt_qa.dropout=0",
        "tasks.captioning.captions_per_video=3", cwd=tmp_path, ranks=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((tmp_path / "runs/ten/scores-test.json").read_text())["tasks"]
    assert scores["msrvtt_qa"]["metrics"]["accuracy"] == 100
    assert scores["retrieval"]["metrics"]["text_to_video/R@1"] == 100
    references = {item["id"]: item["captions"] for item in json.loads((videos / "annotations.json").read_text())}
    for item in json.loads((tmp_path / "runs/ten/captions-test.json").read_text()):
        assert item["caption"] in [" ".join(text.lower().split()) for text in references[item["image_id"]]]


@pytest.mark.slow
def test_the_whole_way_from_files_to_a_report(tmp_path: Path) -> None:
    """The nineteen clips by the script of docs/msrvtt.md, a slice of its training."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = [
        sys.executable, "benchmarks/whole_way.py", "clips", "--annotations", str(shared("data/msrvtt")),
        "--videos", str(shared("data/videos")), "--out", str(tmp_path), "optim.max_steps=3", "tracking.enabled=false",
        f"model.name={TINY}", "data.size=32", "data.frames=3",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "every shard is as it was written" in done.stdout
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Every inference option" in page and "video7014" in page
    scores = json.loads((tmp_path / "runs/run/scores-test.json").read_text())
    assert scores["samples"] == 20  # two samples are parts of one of the nineteen files
    assert "230 texts x 20 videos" in scores["tasks"]["retrieval"]["protocol"]
