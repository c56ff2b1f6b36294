"""Real clips, H.264 in MP4 and AVI: the shard writer, PyAV, the launch command, and a tiny model that learns them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import launch, shared
from emcl.prepare.folder import prepare_folder


@pytest.mark.slow
def test_a_tiny_model_retrieves_all_ten_in_both_directions(tmp_path: Path) -> None:
    videos = shared("data/videos")
    report = prepare_folder(videos, videos / "annotations.json", tmp_path / "shards", progress=False)
    assert report.written == {"train": 10}
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
