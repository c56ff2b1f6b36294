"""MLflow's record of a run: names that its store takes, and a run that goes on."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from conftest import make_store
from emcl import async_sender, tracking
from emcl.config import Config, resolve
from emcl.tracking import Tracker, open_tracker
from local_ranks import free_port


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


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    """A real MLflow server on 127.0.0.1; what it holds is in `folder`."""
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    if not (folder / "server.db").exists():
        make_store(folder / "server.db")
    with (folder / "server.log").open("a") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            time.sleep(0.5)
        yield
    finally:
        running.terminate()
        running.wait(30)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, int, str]:
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    monkeypatch.setattr(async_sender, "LONGEST_PAUSE", 2.0)
    return tmp_path, port, uri


@pytest.mark.slow
def test_a_server_that_is_away_for_a_while_gets_everything_once(
    served: tuple[Path, int, str], caplog: pytest.LogCaptureFixture
) -> None:
    folder, port, uri = served
    with server(folder, port):
        tracker = open_tracker(resolve(["retrieval"]), "run", first_rank=True)
        tracker.metrics({"train/loss": 1.0}, 1)
        time.sleep(2)
    began = time.monotonic()
    for step in range(2, 12):
        tracker.metrics({"train/loss": float(step), "other": 1.0}, step)
    tracker.tag("note", "said while it was away")
    (folder / "note.txt").write_text("kept while it was away")
    tracker.artifact(folder / "note.txt")
    assert time.monotonic() - began < 1, "training waits for the server"
    time.sleep(3)
    with server(folder, port):
        tracker.metrics({"train/loss": 12.0}, 12)
        tracker.finish()
        client = MlflowClient(tracking_uri=uri)
        history = client.get_metric_history(str(tracker.run_id), "train/loss")
        assert [(item.step, item.value) for item in history] == [(step, float(step)) for step in range(1, 13)]
        assert len(client.get_metric_history(str(tracker.run_id), "other")) == 10
        run = client.get_run(str(tracker.run_id))
        assert run.data.tags["note"] == "said while it was away" and run.info.status == "FINISHED"
        assert [item.path for item in client.list_artifacts(str(tracker.run_id))] == ["note.txt"]
    assert "does not answer" in caplog.text and "answers again" in caplog.text


@pytest.mark.slow
def test_what_could_not_be_sent_at_all_is_kept_and_sent_when_the_run_goes_on(
    served: tuple[Path, int, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, port, uri = served
    monkeypatch.setattr(tracking, "DRAIN", 2.0)
    config = resolve(["retrieval"])
    with server(folder, port):
        first = open_tracker(config, "run", first_rank=True, unsent=folder / "unsent.json")
        first.metrics({"train/loss": 1.0}, 1)
        time.sleep(2)
    for step in (2, 3):
        first.metrics({"train/loss": float(step)}, step)
    first.finish("KILLED")
    assert (folder / "unsent.json").is_file()
    with server(folder, port):
        second = open_tracker(config, "run", first_rank=True, continued=first.run_id, unsent=folder / "unsent.json")
        assert (folder / "unsent.json").is_file()  # until all of it has arrived: a kill loses nothing
        second.metrics({"train/loss": 4.0}, 4)
        second.finish()
        history = MlflowClient(tracking_uri=uri).get_metric_history(str(first.run_id), "train/loss")
        assert [(item.step, item.value) for item in history] == [(step, float(step)) for step in range(1, 5)]
    assert not (folder / "unsent.json").exists()


def test_a_record_that_the_store_refuses_holds_up_nothing(opened: Config, caplog: pytest.LogCaptureFixture) -> None:
    tracker = open_tracker(opened, "run", first_rank=True)
    tracker.metrics({"no such name?!*": 1.0}, 1)
    tracker.metrics({"train/loss": 1.0}, 2)
    tracker.finish()
    assert MlflowClient().get_run(str(tracker.run_id)).data.metrics == {"train/loss": 1.0}
    assert "refused a record" in caplog.text


def test_what_arrived_though_its_answer_was_lost_is_not_sent_twice(
    opened: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_sender, "PAUSE", 0.1)
    tracker: Any = open_tracker(opened, "run", first_rank=True)
    client, lost = tracker._client, [True]
    send = client.log_batch

    def answer_lost(*arguments: Any, **named: Any) -> None:
        send(*arguments, **named)
        if lost.pop() if lost else False:
            raise ConnectionError

    monkeypatch.setattr(client, "log_batch", answer_lost)
    tracker.metrics({"train/loss": 1.0}, 1)
    tracker.finish()
    assert not lost
    assert len(MlflowClient().get_metric_history(tracker.run_id, "train/loss")) == 1


def test_a_later_run_elsewhere_has_a_store_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        tracker = open_tracker(resolve(["retrieval"]), "run", first_rank=True)
        tracker.finish()
        assert tracker.uri == f"sqlite:///{folder}/mlflow.db"
