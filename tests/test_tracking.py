"""MLflow's record of a run: names that its store takes, and a run that goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from emcl.config import Config, resolve
from emcl.tracking import Tracker, open_tracker


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    return resolve(["retrieval"], "sample", ['data.mixture={sample: 3, "b/train-*.tar": 1}'])


def test_a_mixture_of_patterns_is_recorded(opened: Config) -> None:
    tracker = open_tracker(opened, "mixed", first_rank=True)
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.finish()
    assert type(tracker) is not Tracker
    run = MlflowClient().get_run(str(tracker.run_id))
    assert run.data.params["data.mixture.b/train-_.tar"] == "1.0"
    assert run.data.metrics["train/loss"] == 1.0


def test_a_run_that_goes_on_is_the_same_one_and_repeats_no_step(opened: Config) -> None:
    first = open_tracker(opened, "run", first_rank=True)
    for step in (1, 2, 3):
        first.metrics({"train/loss": float(step)}, step)
    first.finish("KILLED")
    second = open_tracker(opened, "run", first_rank=True, continued=first.run_id)
    for step in (2, 3, 4):  # from the checkpoint of step 1
        second.metrics({"train/loss": float(step), "val/R1": float(step)}, step)
    second.finish()
    assert second.run_id == first.run_id
    client = MlflowClient()
    history = client.get_metric_history(str(first.run_id), "train/loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert [metric.step for metric in client.get_metric_history(str(first.run_id), "val/R1")] == [2, 3, 4]
    assert client.get_run(str(first.run_id)).info.status == "FINISHED"


def test_an_unknown_run_is_named_and_a_new_one_recorded(opened: Config, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_tracker(opened, "run", first_rank=True, continued="0" * 32)
    tracker.finish()
    assert tracker.run_id not in (None, "0" * 32)
    assert "does not know the run" in caplog.text
