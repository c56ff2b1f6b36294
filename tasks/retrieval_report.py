"""What a report shows of retrieval: recall in both directions beside published figures, and examples."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from emcl.tasks.retrieval_plots import embeddings_of, plots, similarity_of

from emcl.metrics.bootstrap import interval
from emcl.metrics.rescoring import label_of
from emcl.metrics.retrieval_metrics import RECALLS
from emcl.pictures import FramesOf, blank_figure, strip
from emcl.run_folder import OPTIONS
from emcl.task import Case, Published, Result, Shown, Table, TaskReport, Variant
from emcl.task.task_report import EXAMPLES, Interval, PictureOf

WAYS = {"text_to_video": "t2v", "video_to_text": "v2t"}
RANKED = ("R@1", "R@5", "R@10", "MdR", "MnR")
COLUMNS = [f"{way}/{name}" for way in WAYS for name in RANKED]
SHOWN = 3
"""Videos of an example in a report."""
DRAWN, FIRST = 6, 5
"""Queries in a run's picture, and videos found for each."""
WITHOUT_FACTORS = "without_factors"
"""As the name of a rescoring: the scores without the model's shared factors."""
TRANSDUCTIVE, INDUCTIVE = "transductive", "inductive"
"""Whether a query's ranks depend on other queries of the test."""
RESCORED = re.compile(rf"({'|'.join(WAYS)})_(.+)_({TRANSDUCTIVE}|{INDUCTIVE})/(.+)")
"""A metric of a rescored similarity: direction, rescoring, kind, metric."""
PAPER, README = "EMCL, NeurIPS 2022", "the reference's README"
NET, NETPP = "EMCL-Net", "EMCL-Net++ (DSL)"


def _short(metric: str) -> str:
    way, _, name = metric.rpartition("/")
    return f"{WAYS.get(way, way)} {name}".strip().replace("_", " ")


OPTION_COLUMNS = ["EMCL", "rescoring", "", *map(_short, COLUMNS)]


@dataclass(frozen=True)
class Option:
    """One combination of inference options with its metrics (`emcl options`)."""

    emcl: str
    rescoring: str
    transductive: bool
    metrics: dict[str, dict[str, float]]

    def cells(self) -> list[str]:
        """The cells of a table's line, under `OPTION_COLUMNS`."""
        kind = TRANSDUCTIVE if self.transductive else INDUCTIVE
        return [self.emcl, self.rescoring, kind, *(f"{self.metrics[way][name]:.1f}" for way in WAYS for name in RANKED)]


def _both(text_to_video: str, video_to_text: str = "") -> dict[str, float]:
    """Metrics from text such as `R@1 46.8, MdR 2`."""
    metrics = {}
    for direction, text in (("text_to_video", text_to_video), ("video_to_text", video_to_text)):
        for entry in filter(None, text.split(", ")):
            name, value = entry.split(" ")
            metrics[f"{direction}/{name}"] = float(value)
    return metrics


PUBLISHED = {
    ("msrvtt", "1k-A"): [
        Published(
            NET, PAPER, _both("R@1 46.8, R@5 73.1, R@10 83.1, MdR 2", "R@1 46.5, R@5 73.5, R@10 83.5, MdR 2")
        ),
        Published(
            NETPP, PAPER,
            _both("R@1 51.6, R@5 78.1, R@10 85.3, MdR 1", "R@1 51.8, R@5 80.2, R@10 88.0, MdR 1"), True,
        ),
        Published("EMCL-Net, 2 GPUs", README, _both("R@1 47.0")),
        Published("EMCL-Net, 8 GPUs", README, _both("R@1 48.2")),
        Published("CLIP2Video + EMCL at inference", README, _both("R@1 46.6", "R@1 44.0")),
    ],
    ("activitynet", "val_1"): [
        Published(NET, PAPER, _both("R@1 41.2, R@5 72.7, MdR 2", "R@1 42.7, R@5 74.0, R@50 98.3, MdR 2")),
        Published(
            NETPP, PAPER,
            _both("R@1 50.6, R@5 78.7, R@50 98.1, MdR 1", "R@1 50.6, R@5 78.9, R@50 98.4, MdR 1"), True,
        ),
    ],
    ("lsmdc", "official"): [
        Published(NET, PAPER, _both("R@1 23.9, R@5 42.4, R@10 50.9", "R@1 22.2, R@5 40.6, R@10 49.2, MdR 12")),
        Published(
            NETPP, PAPER,
            _both("R@1 25.9, R@5 46.4, R@10 53.7, MdR 8", "R@1 26.7, R@5 44.7, R@10 54.4, MdR 8"), True,
        ),
    ],
    ("msvd", "official"): [Published(NET, README, _both("R@1 42.1, R@5 71.3, R@10 81.1"))],
    ("didemo", "paragraph"): [Published(NET, README, _both("R@1 46.8, R@5 74.3, R@10 83.1"))],
}  # fmt: skip


class RetrievalReport(TaskReport):
    """Recall and ranks in both directions, those of a rescored similarity in a line of their own."""

    columns = COLUMNS
    published = PUBLISHED

    def short(self, metric: str) -> str:
        return _short(metric)

    def intervals(self, result: Result) -> dict[str, Interval]:
        items, bounds = result.items, {}
        for way, videos in (("text_to_video", "video"), ("video_to_text", "")) if items else ():
            ranks = np.array(items[way])
            clusters = items[videos] if videos else None
            for k in RECALLS:
                bounds[f"{way}/R@{k}"] = interval(100.0 * (ranks <= k), clusters)
            bounds[f"{way}/MnR"] = interval(ranks, clusters)
        return bounds

    def variants(self, result: Result) -> list[Variant]:
        rescored: dict[tuple[str, str], dict[str, float]] = {}
        for key, value in result.metrics.items():
            if match := RESCORED.fullmatch(key):
                way, name, kind, metric = match.groups()
                rescored.setdefault((name, kind), {})[f"{way}/{metric}"] = value
        return [
            Variant("without factors" if name == WITHOUT_FACTORS else label_of(name), kind, metrics)
            for (name, kind), metrics in rescored.items()
        ]

    def tables(self, result: Result) -> list[Table]:
        path = result.file(OPTIONS)
        if not path.is_file():
            return []
        options = [Option(**option) for option in json.loads(path.read_text())]
        return [Table("Every inference option", OPTION_COLUMNS, [option.cells() for option in options])]

    def plots(self, result: Result) -> list[tuple[str, str]]:
        return plots(result)

    def cases(self, result: Result, picture: PictureOf) -> dict[str, list[Case]]:
        """By the rank of a text's own video, then by how far its score is from that of the nearest other."""
        scores_QG = similarity_of(result)
        kept = embeddings_of(result) if scores_QG is not None else None  # not needed alone, and large
        if scores_QG is None or kept is None or not result.items:
            return {}
        ranks, owner = np.array(result.items["text_to_video"]), kept.owner
        own = np.take_along_axis(scores_QG, owner[:, None], 1)[:, 0]
        rivals = scores_QG.copy()
        np.put_along_axis(rivals, owner[:, None], -np.inf, 1)
        margin = own - rivals.max(1)

        def video(index: int, note: str, *, right: bool = False) -> Shown:
            return Shown.of(kept.videos[index], picture, note, right=right)

        def case(query: int) -> Case:
            best = np.argsort(-scores_QG[query])[:SHOWN]
            hits = [video(g, f"found {rank}", right=bool(g == owner[query])) for rank, g in enumerate(best, 1)]
            outcome = f"rank {ranks[query]}, {margin[query]:+.3f} before its rivals"
            return Case(kept.sentences[query], outcome, [video(owner[query], "its own"), *hits])

        return {
            "Best": [case(query) for query in np.lexsort((-margin, ranks))[:EXAMPLES]],
            "Worst": [case(query) for query in np.lexsort((margin, -ranks))[:EXAMPLES]],
        }


@dataclass(frozen=True)
class Found:
    """A query with what was found for it."""

    query: str
    right: int
    """Row of the shards."""
    best: list[int]
    """Rows, best first."""


def draw_found(examples: Sequence[Found], title: str, path: Path, frames_of: FramesOf) -> None:
    """One line an example: the query, its own video, the first that were found; the right one is framed in green."""
    columns = 1 + max(len(example.best) for example in examples)
    figure = blank_figure(2.6 * columns + 2.4, 1.15 * len(examples) + 0.7)
    axes = figure.subplots(len(examples), columns + 1, squeeze=False)
    heads = ["the query's own", *(f"found {rank}" for rank in range(1, columns))]
    for axis, head in zip(axes[0][1:], heads, strict=True):
        axis.set_title(head, fontsize=9)
    for line, example in zip(axes, examples, strict=True):
        line[0].text(0, 0.5, textwrap.fill(example.query, 26), va="center", fontsize=9)
        for column, row in enumerate([example.right, *example.best]):
            axis = line[1 + column]
            axis.imshow(strip(frames_of(row)))
            if column and row == example.right:
                for spine in axis.spines.values():
                    spine.set(color="tab:green", linewidth=3)
        for axis in line:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(axis is not line[0])
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path)
