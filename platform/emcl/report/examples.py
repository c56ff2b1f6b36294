"""The best and the worst of a result, with frames where the shards are at hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from emcl.data.decode import DecodeError
from emcl.data.shards import ShardSet, open_shards
from emcl.errors import UserError
from emcl.evaluate.report import frames_of
from emcl.report.plots import strip_url
from emcl.report.result import Result

COUNT, FOUND = 6, 3


@dataclass(frozen=True)
class Shown:
    """A video, and a word about it."""

    id: str
    note: str
    picture: str | None
    """A data URL."""
    right: bool = False


@dataclass(frozen=True)
class Case:
    """One query with what came of it."""

    query: str
    outcome: str
    videos: list[Shown] = field(default_factory=list)


Picture = Callable[[str], str | None]


def cases(result: Result) -> dict[str, list[Case]]:
    """`best` and `worst`; empty where the run kept too little."""
    picture = _pictures(result)
    if result.task == "retrieval":
        return _retrieval(result, picture)
    if result.task == "captioning":
        return _captions(result, picture)
    if result.task == "msrvtt_qa":
        return _answers(result, picture)
    return {}


def _retrieval(result: Result, picture: Picture) -> dict[str, list[Case]]:
    scores, kept = result.similarity, result.embeddings
    if scores is None or kept is None or not result.items:
        return {}
    ranks, owner = np.array(result.items["text_to_video"]), kept.owner
    own = np.take_along_axis(scores, owner[:, None], 1)[:, 0]
    rivals = scores.copy()
    np.put_along_axis(rivals, owner[:, None], -np.inf, 1)
    margin = own - rivals.max(1)

    def case(query: int) -> Case:
        best = np.argsort(-scores[query])[:FOUND]
        videos = [Shown(kept.videos[owner[query]], "its own", picture(kept.videos[owner[query]]))]
        videos += [
            Shown(kept.videos[g], f"found {n}", picture(kept.videos[g]), bool(g == owner[query]))
            for n, g in enumerate(best, 1)
        ]
        return Case(kept.sentences[query], f"rank {ranks[query]}, {margin[query]:+.3f} before its rivals", videos)

    return {
        "best": [case(query) for query in np.lexsort((-margin, ranks))[:COUNT]],
        "worst": [case(query) for query in np.lexsort((margin, -ranks))[:COUNT]],
    }


def _captions(result: Result, picture: Picture) -> dict[str, list[Case]]:
    items = result.items
    name = next((name for name in items if name.startswith("CIDEr")), None)
    if name is None:
        return {}

    def case(place: int) -> Case:
        video = Shown(items["id"][place], "", picture(items["id"][place]))
        outcome = f"{name} {items[name][place]:.0f}; a person wrote: {items['reference'][place]}"
        return Case(items["caption"][place], outcome, [video])

    order = np.argsort(-np.array(items[name]), kind="stable").tolist()
    return {"best": [case(n) for n in order[:COUNT]], "worst": [case(n) for n in order[::-1][:COUNT]]}


def _answers(result: Result, picture: Picture) -> dict[str, list[Case]]:
    items = result.items
    if not items:
        return {}

    def case(place: int) -> Case:
        right = items["answer"][place] or "an answer that training had not"
        outcome = f"given: {items['given'][place]}; right: {right}"
        return Case(items["question"][place], outcome, [Shown(items["id"][place], "", picture(items["id"][place]))])

    hit = np.array(items["accuracy"]) > 0
    found = {}
    for name, places in (("best", np.flatnonzero(hit)), ("worst", np.flatnonzero(~hit))):
        chosen = places[np.linspace(0, len(places) - 1, min(COUNT, len(places))).astype(int)] if len(places) else []
        found[name] = [case(int(place)) for place in chosen]
    return found


def _pictures(result: Result) -> Picture:
    shards = _shards(str(result.config.data.test))
    if shards is None:
        return lambda _: None
    rows = {row.sample.id: number for number, row in enumerate(shards.rows)}
    return lambda identity: _picture(shards, result, rows.get(identity))


@lru_cache(maxsize=1)
def _shards(pattern: str) -> ShardSet | None:
    """Opened once for all tasks of a run; None where the shards are not, as a report may be made elsewhere."""
    try:
        return open_shards(pattern)
    except UserError:
        return None


def _picture(shards: ShardSet, result: Result, row: int | None) -> str | None:
    if row is None:
        return None
    try:
        frames = frames_of(shards, result.config, row)
    except (DecodeError, OSError):
        return None
    return strip_url(frames)
