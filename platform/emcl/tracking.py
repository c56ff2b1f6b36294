"""MLflow: a SQLite file by default, a server where MLFLOW_TRACKING_URI says so. Tracking never stops training."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emcl.config import Config, flatten

log = logging.getLogger(__name__)

TIMEOUT = 5.0
PARAM_LENGTH = 6000


class Tracker:
    """One run's record. The null object: everything is accepted and nothing kept."""

    uri: str | None = None
    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def tag(self, name: str, value: str) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...


class MLflowTracker(Tracker):
    """An MLflow run; after an error of the store it says so once and goes on without.

    With `continued`, the run of that id goes on: what it holds already of a metric is not written twice.
    """

    def __init__(
        self, uri: str, config: Config, name: str, *, local_artifacts: Path | None, continued: str | None = None
    ) -> None:
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self.uri = uri
        self._mlflow = mlflow
        self._failed = False
        mlflow.set_tracking_uri(uri)
        self._last: dict[str, int] | None = None
        if continued is not None:
            self._run = mlflow.start_run(run_id=continued, log_system_metrics=True)
            self._last = {}
        else:
            experiment = mlflow.get_experiment_by_name(config.tracking.experiment)
            if experiment is None:
                location = local_artifacts.resolve().as_uri() if local_artifacts else None
                identifier = mlflow.create_experiment(config.tracking.experiment, artifact_location=location)
            else:
                identifier = experiment.experiment_id
            self._run = mlflow.start_run(experiment_id=identifier, run_name=name, log_system_metrics=True)
            mlflow.log_params({_parameter(key): str(value)[:PARAM_LENGTH] for key, value in flatten(config).items()})
        self.run_id = self._run.info.run_id
        mlflow.set_tag("commit", commit())

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        def log() -> None:
            new = {_allowed(key): value for key, value in values.items() if step > self._logged(_allowed(key))}
            self._mlflow.log_metrics(new, step=step)

        self._try(log)

    def _logged(self, key: str) -> int:
        """The last step that the run held of a metric when it was continued."""
        if self._last is None:
            return -1
        if key not in self._last:
            history = self._mlflow.MlflowClient().get_metric_history(self._run.info.run_id, key)
            self._last[key] = max((item.step for item in history), default=-1)
        return self._last[key]

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._try(lambda: self._mlflow.log_artifact(str(path), folder))

    def tag(self, name: str, value: str) -> None:
        self._try(lambda: self._mlflow.set_tag(name, value))

    def finish(self, status: str = "FINISHED") -> None:
        self._try(lambda: self._mlflow.end_run(status))

    def _try(self, act: Any) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:
            self._failed = True
            log.warning(
                "MLflow at %s stopped answering (%s); training goes on without it", self.uri, str(error).splitlines()[0]
            )


def open_tracker(config: Config, name: str, *, first_rank: bool, continued: str | None = None) -> Tracker:
    """The run's tracker on rank 0; the null object elsewhere and where tracking is off.

    With `continued`, that MLflow run goes on, where the store knows it.
    """
    if not (first_rank and config.tracking.enabled):
        return Tracker()
    wanted = os.environ.get("MLFLOW_TRACKING_URI")
    local = f"sqlite:///{Path('mlflow.db').resolve()}"
    artifacts = Path("mlartifacts")
    if wanted and wanted.startswith("http") and not _answers(wanted):
        log.warning("MLflow at %s does not answer; recording in the local store %s instead", wanted, local)
        wanted = None
    # the client's own retries take minutes; a server that answers now and not later is given up sooner
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    chosen = wanted or local
    try:
        if continued is not None and not _knows(chosen, continued):
            log.warning("MLflow at %s does not know the run %s; a new one is recorded", chosen, continued)
            continued = None
        return MLflowTracker(chosen, config, name, local_artifacts=None if wanted else artifacts, continued=continued)
    except Exception as error:
        log.warning(
            "MLflow at %s cannot be used (%s); training goes on without it", wanted or local, str(error).splitlines()[0]
        )
        return Tracker()


def _knows(uri: str, run_id: str) -> bool:
    from mlflow import MlflowClient, MlflowException

    try:
        MlflowClient(tracking_uri=uri).get_run(run_id)
        return True
    except MlflowException:
        return False


def commit() -> str:
    """The checkout's commit, with `-dirty` where files differ from it; `unknown` outside a checkout."""
    try:
        here = Path(__file__).parent
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
        return found.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True  # it is there, and wants a password perhaps
    except (OSError, ValueError):
        return False


def _parameter(key: str) -> str:
    """A mixture's shards are part of a name, and MLflow's have none of `*{}`."""
    return re.sub(r"[^\w\-./: ]", "_", key)


def _allowed(key: str) -> str:
    """MLflow's names have no @: `text_to_video/R@1` is `text_to_video/R1` there."""
    return key.replace("@", "")
