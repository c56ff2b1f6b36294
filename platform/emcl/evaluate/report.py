"""Scores as a table, as JSON and as pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emcl.config import Config
from emcl.data.decode import decode
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


def as_json(scores: Mapping[str, Scores], split: str, config: Config) -> dict[str, Any]:
    return {
        "split": split,
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

    def frames_of(row: int) -> Any:
        found = shards.rows[row]
        start, end = found.sample.start, found.sample.end
        return decode(shards.read(found), frames=6, size=112, start=start, end=end, fps=config.data.fps)

    path = folder / f"scores-{split}.json"
    path.write_text(json.dumps(as_json(scores, split, config), indent=1))
    tracker.artifact(path)
    for name, item in scores.items():
        tracker.metrics({f"{split}/{name}/{key}": value for key, value in item.metrics.items()}, step)
        text = folder / f"{name}-{split}.txt"
        text.write_text(table(item) + "\n")
        tracker.artifact(text)
        for filename, content in item.files.items():
            kept = folder / filename.format(split=split)
            kept.write_text(content)
            tracker.artifact(kept)
        if item.picture is not None:
            picture = folder / f"{name}-{split}.png"
            item.picture(picture, frames_of)
            tracker.artifact(picture)
