"""What `emcl report` shows of a task's results: columns, published figures, intervals, plots, examples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from emcl.metrics.bootstrap import interval
from emcl.task.task_result import Result

EXAMPLES = 6
"""Examples of the best, and of the worst."""

Interval = tuple[float, float]
PictureOf = Callable[[str], str | None]
"""A sample's id to some of its frames as a data URL; None if its shards are not available."""


@dataclass(frozen=True)
class Published:
    """One line of a paper's table."""

    model: str
    source: str
    metrics: dict[str, float]
    """As the task names and scales them."""
    transductive: bool = False
    """Whether a query's result depends on the other queries of the test."""


@dataclass(frozen=True)
class Variant:
    """A second line of a result: the same model scored in another way."""

    name: str
    note: str
    metrics: dict[str, float]


@dataclass(frozen=True)
class Table:
    """One more table below a result."""

    title: str
    columns: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class Shown:
    """A video, and a note on it."""

    id: str
    note: str
    picture: str | None
    """A data URL."""
    right: bool = False

    @classmethod
    def of(cls, identity: str, picture: PictureOf, note: str = "", *, right: bool = False) -> Shown:
        """A sample with its frames, where there are any."""
        return cls(identity, note, picture(identity), right)


@dataclass(frozen=True)
class Case:
    """One query with its result."""

    query: str
    outcome: str
    videos: list[Shown] = field(default_factory=list)


class TaskReport:
    """The default: every metric, with intervals if each query's values were saved. A task's report adds the rest."""

    columns: Sequence[str] = ()
    """The metrics of a table, in order; empty for all."""
    published: Mapping[tuple[str, str], Sequence[Published]] = {}
    """Figures of papers by benchmark and protocol, as `emcl prepare` names them."""

    def columns_of(self, metrics: Sequence[str]) -> list[str]:
        """The columns of a table of results, given all of their metrics."""
        return list(self.columns or metrics)

    def short(self, metric: str) -> str:
        """A metric's name as a column heading."""
        return metric.replace("/", " ").replace("_", " ")

    def intervals(self, result: Result) -> dict[str, Interval]:
        """95% bounds of each metric that is the mean of a column of `Scores.items`; whole samples are resampled."""
        items = result.items
        return {name: interval(items[name], items.get("id")) for name in result.metrics if name in items}

    def variants(self, result: Result) -> list[Variant]:
        """Further lines below the result's own, for the same model scored in other ways."""
        return []

    def tables(self, result: Result) -> list[Table]:
        """Further tables in the result's section of the page."""
        return []

    def plots(self, result: Result) -> list[tuple[str, str]]:
        """Caption and picture, as a data URL (`emcl.pictures.drawn`), of the plots that the saved files allow."""
        return []

    def cases(self, result: Result, picture: PictureOf) -> dict[str, list[Case]]:
        """Examples under a heading each, such as `Best` and `Worst`; empty if the run saved too little."""
        return {}


def best_and_worst(values: Sequence[float], case: Callable[[int], Case]) -> dict[str, list[Case]]:
    """The queries of the highest and of the lowest values, given by their indices in `Scores.items`."""
    order = np.argsort(-np.asarray(values, np.float64), kind="stable").tolist()
    return {
        "Best": [case(index) for index in order[:EXAMPLES]],
        "Worst": [case(index) for index in order[::-1][:EXAMPLES]],
    }
