"""Scores as a table, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from emcl.config import Config
from emcl.data.decode import Frames, decode
from emcl.data.shards import ShardSet
from emcl.task import Scores
from emcl.tracking import Tracker, commit


def table(scores: Scores) -> str:
    """The metrics; the protocol beneath."""
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


def as_json(scores: Mapping[str, Scores], shards: ShardSet, split: str, config: Config) -> dict[str, Any]:
    benchmark, protocol = shards.origin()
    return {
        "split": split,
        "benchmark": benchmark,
        "benchmark_split": protocol,
        "samples": len(shards),
        "commit": commit(),
        "seed": config.seed,
        "tasks": {name: {"metrics": item.metrics, "protocol": item.protocol} for name, item in scores.items()},
    }


def record(
    scores: Mapping[str, Scores],
    shards: ShardSet,
    config: Config,
    folder: Path,
    tracker: Tracker,
    *,
    split: str,
    step: int,
) -> None:
    """Writes `scores-SPLIT.json`, the tables and the pictures to the run's folder and to MLflow; on rank 0."""

    summary = as_json(scores, shards, split, config)
    for name in ("benchmark", "benchmark_split"):
        tracker.tag(name, summary[name])
    path = folder / f"scores-{split}.json"
    path.write_text(json.dumps(summary, indent=1))
    tracker.artifact(path)
    for name, item in scores.items():
        tracker.metrics({f"{split}/{name}/{key}": value for key, value in item.metrics.items()}, step)
        tracker.tag(f"{split}.{name}.protocol", item.protocol)
        text = folder / f"{name}-{split}.txt"
        text.write_text(table(item) + "\n")
        tracker.artifact(text)
        for filename, content in item.files.items():
            kept = folder / filename.format(split=split)
            kept.write_text(content)
            tracker.artifact(kept)
        if item.items:
            kept = folder / f"items-{name}-{split}.json"
            kept.write_text(json.dumps(item.items))
            tracker.artifact(kept)
        for filename, write in item.save.items() if split == "test" else ():
            write(folder / filename.format(split=split))  # large: not for MLflow
        if item.picture is not None:
            picture = folder / f"{name}-{split}.png"
            item.picture(picture, partial(frames_of, shards, config))
            tracker.artifact(picture)


def frames_of(shards: ShardSet, config: Config, row: int) -> Frames:
    """Some small frames of a sample, to be looked at."""
    found = shards.rows[row]
    start, end = found.sample.start, found.sample.end
    return decode(shards.read(found), frames=6, size=112, start=start, end=end, fps=config.data.fps)
