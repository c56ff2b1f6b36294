"""A task's test scores in a run's folder, read without the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from emcl.config import Config
from emcl.errors import UserError, first_line
from emcl.prepare.benchmarks import BENCHMARKS
from emcl.run_folder import RunFolder


@dataclass(frozen=True)
class Result:
    """One task of one run on its test split."""

    folder: RunFolder
    task: str
    """Its name in the run."""
    metrics: dict[str, float]
    protocol: str
    benchmark: str
    split: str
    """The benchmark's protocol, as `emcl prepare` names it."""
    samples: int
    commit: str
    seed: int
    config: Config
    chosen: str = ""
    """How the model was chosen."""

    @property
    def kind(self) -> str:
        """The kind of task."""
        return self.config.kind_of(self.task)

    @property
    def name(self) -> str:
        """The run's name, with the task's if that differs from its kind."""
        return self.folder.name if self.task == self.kind else f"{self.folder.name}: {self.task}"

    def file(self, name: str) -> Path:
        """A further file of the task (`Scores.save`, `Scores.files`), by that name; it may not exist."""
        return self.folder.kept(name, "test", alias=self.config.alias_of(self.task))

    @cached_property
    def items(self) -> dict[str, list[Any]]:
        """The result of each query, column by column; empty if it was not saved."""
        path = self.folder.items(self.task, "test")
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def incomplete(self) -> str:
        """Why it cannot be compared with published figures; empty if it can."""
        known = BENCHMARKS.get(self.benchmark)
        if known is None or not known.protocols.get(self.split):
            return "no published protocol"
        wanted = known.protocols[self.split]["test"][0]
        return "" if self.samples == wanted else f"{self.samples:,} of {wanted:,} test videos"


def open_results(path: Path) -> list[Result]:
    """Each task of a run.

    Raises:
        UserError: no run there, or one that was not scored on its test split.
    """
    folder = RunFolder.open(path)
    kept = folder.scores("test")
    if not kept.is_file():
        raise UserError(f"{folder} holds no {kept.name}: `emcl evaluate {folder}` writes it")
    config = folder.config()
    try:
        scores = json.loads(kept.read_text())
        return [
            Result(
                folder=folder,
                task=task,
                metrics=item["metrics"],
                protocol=item["protocol"],
                benchmark=scores.get("benchmark", ""),
                split=scores.get("benchmark_split", ""),
                samples=scores.get("samples", 0),
                commit=item.get("commit", scores["commit"]),
                seed=scores["seed"],
                config=config,
                chosen=scores.get("model", ""),
            )
            for task, item in scores["tasks"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: {kept.name} is not readable ({first_line(error)})") from None
