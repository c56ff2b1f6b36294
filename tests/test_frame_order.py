"""What the sample set is for: a model trained on it has learnt motion, and loses it with the frames' order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import launch
from emcl.prepare.sample import generate


@pytest.mark.slow
def test_shuffled_test_frames_score_clearly_lower(tmp_path: Path) -> None:
    generate(tmp_path / "shards", counts={"train": 2000, "val": 1, "test": 200}, seed=0, progress=False)
    data = [
        "data.generate=false", f"data.train={tmp_path}/shards/train-*.tar", "data.val=null",
        f"data.test={tmp_path}/shards/test-*.tar", "tracking.enabled=false",
    ]  # fmt: skip
    found = {}
    steps = ["optim.epochs=6", "name=order"]
    for order, options in (
        ("kept", [*data, *steps]),
        ("shuffled", ["--evaluate", "runs/order", "evaluate.shuffle_frames=true"]),
    ):
        done = launch("--task", "retrieval", *options, cwd=tmp_path, env={"OMP_NUM_THREADS": "2"})
        assert done.returncode == 0, done.stdout + done.stderr
        metrics = json.loads((tmp_path / "runs/order/scores-test.json").read_text())["tasks"]["retrieval"]["metrics"]
        found[order] = metrics["text_to_video/R@1"]
    assert found["kept"] > 25
    assert found["shuffled"] < 0.8 * found["kept"], found
