"""Scores as a table, as JSON and as pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from emcl.config import Config
from emcl.data.split import Split
from emcl.disk import in_turn, write_whole
from emcl.pictures import frames_of
from emcl.run_folder import RunFolder, export_identity
from emcl.task import Scores
from emcl.tracking import Tracker, commit


def table(scores: Scores) -> str:
    """The metrics, with the protocol below."""
    return f"{lines_of(scores.metrics)}\nprotocol: {scores.protocol}"


def lines_of(metrics: Mapping[str, float]) -> str:
    """Metrics `GROUP/NAME` as one line a group."""
    groups: dict[str, dict[str, float]] = {}
    for key, value in metrics.items():
        group, _, name = key.rpartition("/")
        groups.setdefault(group, {})[name] = value
    names = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = max([len(group) for group in groups] + [10])
    widths = {name: max(8, len(name) + 2) for name in names}
    lines = [" " * width + "".join(f"{name:>{widths[name]}}" for name in names)]
    for group, values in groups.items():
        cells = "".join(f"{values[name]:>{w}.1f}" if name in values else " " * w for name, w in widths.items())
        lines.append(f"{group:<{width}}{cells}".rstrip())
    return "\n".join(lines)


COMPARABLE = ("split", "benchmark_split", "samples_sha256", "model_id")
"""Entries that must be equal for scores of a run's tasks to be stored together."""


def _with_those_before(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    """Adds the other tasks' scores from `path`, if only some of a run's tasks were scored.

    Only those of the same model on the same samples; a note names what is left out.
    """
    try:
        before = json.loads(path.read_text())
        others = {name: {"commit": before["commit"], **item} for name, item in before["tasks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return summary
    if any(key not in before or before[key] != summary[key] for key in COMPARABLE):
        gone = [name for name in others if name not in summary["tasks"]]
        if gone:
            what = f"{', '.join(gone)} in {path} were of other samples or another model"
            print(f"note: the scores of {what}, and are left out", flush=True)
        return summary
    return {**summary, "tasks": {**others, **summary["tasks"]}}


def as_json(scores: Mapping[str, Scores], split: Split, name: str, config: Config) -> dict[str, Any]:
    benchmark, protocol = split.shards.origin()
    return {
        "split": name,
        "benchmark": benchmark,
        "benchmark_split": protocol,
        "samples": len(split),
        "commit": commit(),
        "seed": config.seed,
        "tasks": {task: {"metrics": item.metrics, "protocol": item.protocol} for task, item in scores.items()},
    }


def record(
    scores: Mapping[str, Scores],
    split: Split,
    config: Config,
    folder: RunFolder,
    tracker: Tracker,
    *,
    name: str,
    step: int,
) -> None:
    """Writes `scores-NAME.json`, the tables and the pictures to the run's folder and to MLflow; on rank 0.

    Scores in the folder of tasks that were not scored this time stay.
    """
    summary = {
        **as_json(scores, split, name, config),
        "samples_sha256": hashlib.sha256("\n".join(row.sample.id for row in split.shards.rows).encode()).hexdigest(),
        "model_id": export_identity(folder.export),
        "model": folder.chosen(),
    }
    for tag in ("benchmark", "benchmark_split"):
        tracker.tag(tag, summary[tag])
    path = folder.scores(name)
    with in_turn(folder.path / ".scores.lock", without_locks=True):
        write_whole(path, json.dumps(_with_those_before(summary, path), indent=1))
    tracker.artifact(path)
    for task, item in scores.items():
        tracker.metrics({f"{name}/{task}/{key}": value for key, value in item.metrics.items()}, step)
        tracker.tag(f"{name}.{task}.protocol", item.protocol)
        text = folder.table(task, name)
        write_whole(text, table(item) + "\n")
        tracker.artifact(text)
        for filename, content in item.files.items():
            kept = folder.kept(filename, name, alias=config.alias_of(task))
            write_whole(kept, content)
            tracker.artifact(kept)
        if item.items:
            kept = folder.items(task, name)
            write_whole(kept, json.dumps(item.items))
            tracker.artifact(kept)
        for filename, write in item.save.items() if name == "test" else ():
            write(folder.kept(filename, name, alias=config.alias_of(task)))  # large: not for MLflow
        if item.picture is not None:
            picture = folder.picture(task, name)
            item.picture(picture, partial(frames_of, split.shards, config))
            tracker.artifact(picture)
