"""A loss that is not a number on one rank: the step is left out on all, and many in a row end the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, Outcome, launch, losses, mlflow_run, recorded, small

pytestmark = pytest.mark.xdist_group("zero")


def broken(shards: Path, cwd: Path, bad: str, stage: int, *settings: str) -> Outcome:
    return launch(
        "--task", "retrieval", *small(shards), "data.val=null", "data.test=null", "name=run", "optim.max_steps=6",
        *recorded(cwd), f"deepspeed=deepspeed/zero{stage}.json", *settings, cwd=cwd, ranks=2,
        env={"BAD_STEPS": bad, "PYTHONPATH": str(ROOT / "platform")}, script=ROOT / "tests" / "not_finite.py",
    )  # fmt: skip


@pytest.mark.parametrize(("stage", "variant"), [(0, "reference"), (1, "reference"), (2, "compact"), (3, "reference")])
def test_a_bad_step_is_left_out_on_all_ranks_and_counted(
    stage: int, variant: str, sample_shards: Path, tmp_path: Path
) -> None:
    done = broken(sample_shards, tmp_path, "3", stage, f"emcl.variant={variant}", "emcl.bases=8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 3: the gradient is not finite; left out on all ranks (1 in a row)" in done.stdout + done.stderr
    assert mlflow_run(tmp_path)[1].data.metrics["skipped_steps"] == 1
    assert list(losses(tmp_path)) == [1, 2, 4, 5, 6]  # of a step that was left out there is none
    weights = load_file(tmp_path / "runs/run/best/model.safetensors")
    assert all(value.isfinite().all() for value in weights.values() if value.is_floating_point())


def test_many_in_a_row_end_the_run_and_the_batch_is_kept(sample_shards: Path, tmp_path: Path) -> None:
    done = broken(sample_shards, tmp_path, "4,5,6", 1, "optim.max_skipped=2", "checkpoint.every_steps=2")
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert "2 steps in a row had no finite gradient" in output and "Traceback" not in output
    kept = torch.load(tmp_path / "runs/run/bad-batch-5-rank1.pt", weights_only=True)
    assert len(kept[0]["ids"]) == 4
    assert list((tmp_path / "runs/run/checkpoints").glob("step-*/manifest.json"))
