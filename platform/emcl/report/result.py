"""What a run's folder holds of its test scores, read without the model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from emcl.config import Config
from emcl.errors import UserError, first_line
from emcl.metrics.bootstrap import interval, interval_of
from emcl.metrics.captions import COUNTS, bleu
from emcl.metrics.retrieval import RECALLS
from emcl.model.embeddings import Embeddings
from emcl.prepare.benchmarks import BENCHMARKS
from emcl.run_folder import RunFolder

WAYS = {"text_to_video": "t2v", "video_to_text": "v2t"}
RANKED = ("R@1", "R@5", "R@10", "MdR", "MnR")
COLUMNS = {
    "retrieval": [f"{way}/{name}" for way in WAYS for name in RANKED],
    "captioning": ["BLEU-4", "METEOR", "ROUGE-L", "CIDEr"],
    "msrvtt_qa": ["accuracy", "accuracy_in_vocabulary", "top_5", "most_frequent"],
}
"""Of each task, what a table shows; of another's task all that it has."""


def _bleu_in_per_cent(n: int, counts: NDArray[np.float64]) -> float:
    return 100 * bleu(counts, n)


def short(name: str) -> str:
    """A metric's name over a column."""
    way, _, rest = name.rpartition("/")
    return f"{WAYS.get(way, way)} {rest}".strip().replace("_", " ")


@dataclass(frozen=True)
class Option:
    """One combination of inference options with what it gives."""

    emcl: str
    rescoring: str
    transductive: bool
    """Whether a query's ranks depend on other queries of the test."""
    metrics: dict[str, dict[str, float]]

    def cells(self) -> list[str]:
        """Of a table's line, under `OPTION_COLUMNS`."""
        kind = "transductive" if self.transductive else "inductive"
        return [self.emcl, self.rescoring, kind, *(f"{self.metrics[way][name]:.1f}" for way in WAYS for name in RANKED)]


OPTION_COLUMNS = ["EMCL", "rescoring", "", *(short(name) for name in COLUMNS["retrieval"])]


@dataclass(frozen=True)
class Result:
    """One task of one run on its test split."""

    folder: RunFolder
    task: str
    metrics: dict[str, float]
    protocol: str
    benchmark: str
    split: str
    """The benchmark's protocol, as `emcl prepare` names it."""
    samples: int
    commit: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def items(self) -> dict[str, list[Any]]:
        path = self.folder.items(self.task, "test")
        return json.loads(path.read_text()) if path.is_file() else {}

    @cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """95% bounds of the metrics that are means over queries; whole videos are resampled."""
        items, found = self.items, {}
        if self.task == "retrieval" and items:
            for way, videos in (("text_to_video", items["video"]), ("video_to_text", None)):
                ranks = np.array(items[way])
                for k in RECALLS:
                    found[f"{way}/R@{k}"] = interval(100.0 * (ranks <= k), videos)
                found[f"{way}/MnR"] = interval(ranks, videos)
        for name in self.metrics:
            if name in items:
                found[name] = interval(items[name], items.get("id"))
            elif name.startswith("BLEU-") and COUNTS in items:
                found[name] = interval_of(items[COUNTS], partial(_bleu_in_per_cent, int(name[5])))
        return found

    @property
    def incomplete(self) -> str:
        """What keeps it from being compared with published figures; empty if nothing does."""
        known = BENCHMARKS.get(self.benchmark)
        if known is None or not known.protocols.get(self.split):
            return "no published protocol"
        wanted = known.protocols[self.split]["test"][0]
        return "" if self.samples == wanted else f"{self.samples:,} of {wanted:,} test videos"

    @cached_property
    def similarity(self) -> NDArray[np.float32] | None:
        path = self.folder.similarity("test")
        try:
            return load_file(path)["similarity"] if path.is_file() else None
        except (SafetensorError, KeyError):
            raise UserError(f"{path} is not whole: score the run again: emcl evaluate {self.folder}") from None

    @cached_property
    def embeddings(self) -> Embeddings | None:
        path = self.folder.embeddings("test")
        return Embeddings.open(path) if path.is_file() else None

    @cached_property
    def options(self) -> list[Option]:
        """Of `emcl options`, where it was called."""
        path = self.folder.options
        if self.task != "retrieval" or not path.is_file():
            return []
        return [Option(**option) for option in json.loads(path.read_text())]


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
            )
            for task, item in scores["tasks"].items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder}: {kept.name} is not readable ({first_line(error)})") from None
