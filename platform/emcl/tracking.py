"""MLflow: a SQLite file by default, a server where MLFLOW_TRACKING_URI says so. Tracking never stops training."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emcl.async_sender import AsyncSender, Message
from emcl.config import Config, flatten
from emcl.disk import write_whole
from emcl.errors import first_line
from emcl.secrets import masked
from emcl.version import __version__

log = logging.getLogger(__name__)

VARIABLE = "MLFLOW_TRACKING_URI"
TIMEOUT = 5.0
PARAM_LENGTH = 6000
DRAIN = 60.0
"""Seconds that the end of a run waits for a store that does not answer."""
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED", "UNAUTHENTICATED")


class Tracker:
    """One run's record. The null object: everything is accepted and nothing kept."""

    uri: str | None = None
    run_id: str | None = None

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...

    def artifact(self, path: Path, folder: str | None = None) -> None: ...

    def text(self, content: str, name: str) -> None: ...

    def tag(self, name: str, value: str) -> None: ...

    def finish(self, status: str = "FINISHED") -> None: ...


class MLflowTracker(Tracker):
    """An MLflow run. Records are sent by a thread, kept while the store does not answer, and never sent twice.

    With `continued`, the run of that id goes on: values of a metric that it has already are not written again. Records
    that could not be sent are saved in the file `unsent`, and sent when that run is resumed.
    """

    def __init__(
        self,
        uri: str,
        config: Config,
        name: str,
        *,
        local_artifacts: Path | None,
        continued: str | None = None,
        unsent: Path | None = None,
    ) -> None:
        import mlflow

        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        self.uri = uri
        self._mlflow, self._unsent, self._owed = mlflow, unsent, False
        self._asked_for = os.environ.get(VARIABLE)
        mlflow.set_tracking_uri(uri)  # which sets the variable, too
        self._client = mlflow.MlflowClient(tracking_uri=uri)
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
            mlflow.log_params(
                {_parameter(masked(key)): masked(str(value))[:PARAM_LENGTH] for key, value in flatten(config).items()}
            )
        self.run_id = self._id = str(self._run.info.run_id)
        mlflow.set_tag("commit", commit())
        self._sender = AsyncSender(_is_refusal, lambda text: log.warning("MLflow at %s %s", masked(uri), masked(text)))
        if continued is not None and self._unsent and self._unsent.is_file():
            self._owed = True
            for entries in json.loads(self._unsent.read_text()):
                self._put_metrics(entries)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        self._put_metrics([[_allowed(key), float(value), now, step] for key, value in values.items()])

    def _put_metrics(self, entries: list[list[Any]]) -> None:
        self._sender.put(Message(lambda again: self._send_metrics(entries, again), entries))

    def _send_metrics(self, entries: list[list[Any]], again: bool) -> None:
        """All of them in one request; on a retry (`again`), only what the store does not have."""
        if again:
            self._last = {}  # the store may have more than it confirmed
        new = [self._mlflow.entities.Metric(*entry) for entry in entries if entry[3] > self._logged(entry[0])]
        self._client.log_batch(self._id, metrics=new)

    def _logged(self, key: str) -> int:
        """The last step of a metric in the store when the run was continued, or when the store came back."""
        if self._last is None:
            return -1
        if key not in self._last:
            history = self._client.get_metric_history(self._id, key)
            self._last[key] = max((item.step for item in history), default=-1)
        return self._last[key]

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._sender.put(Message(lambda _: self._client.log_artifact(self._id, str(path), folder)))

    def text(self, content: str, name: str) -> None:
        self._sender.put(Message(lambda _: self._client.log_text(self._id, masked(content), name)))

    def tag(self, name: str, value: str) -> None:
        self._sender.put(Message(lambda _: self._client.set_tag(self._id, name, masked(value))))

    def finish(self, status: str = "FINISHED") -> None:
        left = self._sender.close(DRAIN)
        if left and self._unsent:
            write_whole(self._unsent, json.dumps(left))
            log.warning("%d records of metrics could not be sent; --resume sends them from %s", len(left), self._unsent)
        elif self._owed and self._unsent:  # all of it has arrived
            self._unsent.unlink(missing_ok=True)
        try:
            self._mlflow.end_run(status)
        except Exception as error:
            log.warning("MLflow at %s did not take the run's end (%s)", masked(self.uri or ""), first_line(error))
        if self._asked_for is None:  # a later run of this process chooses for itself
            os.environ.pop(VARIABLE, None)


def _is_refusal(error: Exception) -> bool:
    """Whether the store will never take it, rather than being away."""
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in REFUSALS


def open_tracker(
    config: Config, name: str, *, first_rank: bool, continued: str | None = None, unsent: Path | None = None
) -> Tracker:
    """The run's tracker on rank 0; the null object elsewhere and where tracking is off.

    With `continued`, that MLflow run goes on, if the store knows it. `unsent` is the file for unsent records.
    """
    if not (first_rank and config.tracking.enabled):
        return Tracker()
    wanted = os.environ.get(VARIABLE)
    local = f"sqlite:///{Path('mlflow.db').resolve()}"
    artifacts = Path("mlartifacts")
    if wanted and wanted.startswith("http") and not _answers(wanted):
        log.warning("MLflow at %s does not answer; recording in the local store %s instead", masked(wanted), local)
        wanted = None
    # the client's own retries take minutes; give up sooner on a server that stops answering
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    chosen = wanted or local
    try:
        if continued is not None and not _knows(chosen, continued):
            log.warning("MLflow at %s does not know the run %s; a new one is recorded", masked(chosen), continued)
            continued = None
        kept = None if wanted else artifacts
        return MLflowTracker(chosen, config, name, local_artifacts=kept, continued=continued, unsent=unsent)
    except Exception as error:
        log.warning(
            "MLflow at %s cannot be used (%s); training goes on without it", masked(chosen), masked(first_line(error))
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
    """The checkout's commit, with `-dirty` where files differ from it; outside a checkout, the package's version.

    An environment may be inside another repository, whose commit says nothing about this code.
    """
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=40", "--match=")
    except (OSError, subprocess.SubprocessError):
        return f"version {__version__}"


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    return result.stdout.strip()


def _answers(uri: str) -> bool:
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return True  # it answers, perhaps it wants a password
    except (OSError, ValueError):
        return False


def _parameter(key: str) -> str:
    """A mixture's shards are part of a name, and MLflow's names must not contain `*{}`."""
    return re.sub(r"[^\w\-./: ]", "_", key)


def _allowed(key: str) -> str:
    """MLflow's names have no @: `text_to_video/R@1` is `text_to_video/R1` there."""
    return key.replace("@", "")
