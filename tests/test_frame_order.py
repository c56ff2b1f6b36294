"""What the sample set is for: a model trained on it has learnt motion, and loses it with the order of frames."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import launch
from emcl.prepare.sample_set import generate


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_shuffled_test_frames_score_clearly_lower(tmp_path: Path) -> None:
    """All of the recipe's steps: order is learnt late, and 6 epochs of them leave a model that is blind to it."""
    generate(tmp_path / "shards" / "sample", progress=False)
    trained = ["data.val=null", "tracking.enabled=false", "name=order"]
    scored = ["--evaluate", "runs/order", "evaluate.shuffle_frames=true"]
    recalls = {}
    for order, options, split in (("kept", trained, "test"), ("shuffled", scored, "test-shuffled")):
        threads = {"OMP_NUM_THREADS": "2"}
        done = launch("--task", "retrieval", *options, cwd=tmp_path, env=threads, timeout=3000)
        assert done.returncode == 0, done.stdout + done.stderr
        scores = json.loads((tmp_path / f"runs/order/scores-{split}.json").read_text())
        recalls[order] = scores["tasks"]["retrieval"]["metrics"]["text_to_video/R@1"]
    assert recalls["kept"] > 35
    assert recalls["shuffled"] < 0.8 * recalls["kept"], recalls
