"""`--profile N`: a trace that opens, and a summary whose parts add up."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

from conftest import launch, mlflow_run, recorded, small


def test_a_profile_names_each_part_and_its_trace_is_kept(sample_shards: Path, tmp_path: Path) -> None:
    settings = [
        *small(sample_shards),
        "optim.epochs=9",
        "optim.max_steps=12",
        "data.val=null",
        "data.test=null",
        "name=run",
    ]
    settings += recorded(tmp_path)
    done = launch("--task", "retrieval,captioning", *settings, "--profile", "4", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "runs/run/profile/summary.txt").read_text()
    assert text in done.stdout + done.stderr
    shares = {name: int(share) for name, share in re.findall(r"^(\w+) +[\d.]+ +(\d+)%", text, re.MULTILINE)}
    assert set(shares) == {"data", "forward", "backward", "optimizer"}
    assert abs(sum(shares.values()) - 100) <= 2
    for label in ("image tower", "text tower", "temporal", "  retrieval ", "captioning/decoder", "communication"):
        assert label in text
    with gzip.open(tmp_path / "runs/run/profile/trace.json.gz") as trace:
        names = [event.get("name") for event in json.load(trace)["traceEvents"]]
    assert names.count("emcl: backward") == 4
    client, run = mlflow_run(tmp_path)
    kept = {item.path for item in client.list_artifacts(run.info.run_id, "profile")}
    assert kept == {"profile/trace.json.gz", "profile/summary.txt"}
