"""The server's operations on the model and the index; called from one thread only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from emcl.data.decode import duration
from emcl.features import VideoFeatures
from emcl.given_videos import Span, Video
from emcl.search.hits import Hit, Window
from emcl.search.index import VideoIndex
from emcl.search.windows import Windows
from emcl.task import Offer, Prediction

PARTS = 64
"""Largest number of intervals in a sent video's curve."""

Curve = list[tuple[float, float]]
"""Seconds and similarity, in order of time."""


@dataclass(frozen=True)
class Asked:
    """The arguments of a prediction, except the video (`VideoTextModel.predict`)."""

    task: str | None = None
    verb: str | None = None
    question: str | None = None
    top: int = 1


class Service:
    def __init__(self, index: VideoIndex, kept: int) -> None:
        self.index, self.model = index, index.model
        self._kept: OrderedDict[tuple[str, str], VideoFeatures] = OrderedDict()
        self._room = kept

    @property
    def tasks(self) -> list[str]:
        return list(self.model.model.heads)

    @property
    def offers(self) -> dict[str, Offer]:
        return self.model.offers

    def search(self, query: str, top: int) -> list[Hit]:
        return self.index.search(query, top)

    def search_by_video(self, path: Path, digest: str, top: int) -> list[Hit]:
        return self.index.search_by_features(self._whole(path, digest), top)

    def similar(self, window: Window, top: int) -> list[Hit]:
        return self.index.search_by_features(self.index.features([window.number]), top)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(texts)

    def embed_video(self, path: Path, digest: str) -> Tensor:
        """(T, D) embeddings of the video's frames."""
        features = self._whole(path, digest)
        return features.frames[0][features.mask[0]]

    def predict(self, path: Path, digest: str, asked: Asked) -> list[Prediction]:
        return self._predicted(self._whole(path, digest), asked)

    def predict_of_window(self, window: Window, asked: Asked) -> list[Prediction]:
        return self._predicted(self.index.features([window.number]), asked)

    def check(self, asked: Asked) -> None:
        """Checks a request before its video is received.

        Raises:
            UserError: no task matches, or a question is missing or not wanted.
        """
        self.model.task_for(asked.task, asked.verb, question=asked.question)

    def _predicted(self, features: VideoFeatures, asked: Asked) -> list[Prediction]:
        return self.model.predict(features, asked.question, task=asked.task, verb=asked.verb, top=asked.top)[0]

    def curve_of_window(self, window: Window, query: str) -> Curve:
        """Similarity over the window's whole file."""
        neighbours = self.index.neighbours(window.number)
        features = self.index.features([neighbour.number for neighbour in neighbours])
        return self._curve(features, [(neighbour.start, neighbour.end) for neighbour in neighbours], query)

    def curve(self, path: Path, digest: str, query: str) -> Curve:
        """Similarity over a sent video, in at most PARTS intervals."""
        seconds = duration(path)
        intervals = Windows(max(self.index.windows.length, seconds / PARTS), 0.0, "windows").of(seconds)
        spans: list[Video] = [Span(path, *interval) for interval in intervals]
        features = self._remembered(digest, "curve", lambda: self.model.encode_video(spans, progress=False))
        return self._curve(features, intervals, query)

    def _curve(self, features: VideoFeatures, intervals: Sequence[tuple[float, float]], query: str) -> Curve:
        """The cosine of the sentence with each frame."""
        text = F.normalize(self.model.encode_text(query), dim=-1)[0]
        scores = F.normalize(features.frames, dim=-1) @ text  # (n, T)
        points: Curve = []
        for (start, end), row, present in zip(intervals, scores, features.mask, strict=True):
            values = row[present].tolist()
            points += [(start + (end - start) * (index + 0.5) / len(values), v) for index, v in enumerate(values)]
        return sorted(points)

    def _whole(self, path: Path, digest: str) -> VideoFeatures:
        return self._remembered(digest, "whole", lambda: self.model.encode_video(path, progress=False))

    def _remembered(self, digest: str, what: str, encode: Callable[[], VideoFeatures]) -> VideoFeatures:
        key = (digest, what)
        features = self._kept.pop(key, None)
        if features is None:
            features = encode()
        self._kept[key] = features
        while len(self._kept) > self._room:
            self._kept.popitem(last=False)
        return features
