"""The scorers' base class: records of all ranks in the order of their samples, and errors that all ranks hear of."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from emcl.tasks.retrieval_scorer import RetrievalScorer

from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.task import Record, Scorer, Scores
from ranks import run_on_ranks

ROWS = 7


class Words(Scorer):
    """Two records of each sample."""

    def update(self, encoded: Any, inputs: Any | None, rows: Any) -> None:
        self.records += [(row, word) for row in rows for word in ("first", "second")]

    def compute(self, records: list[Record]) -> Scores:
        if self.task == "nothing":
            raise UserError("nothing to score")
        return Scores({"records": len(records)}, "all", chosen="records", items={"record": records})


def scored(ranks: Ranks, task: str) -> tuple[dict[str, Any], Any] | str:
    evaluation: Any = SimpleNamespace(ranks=ranks, name="words")
    scorer = Words(task, evaluation)
    batches = [range(ROWS)[ranks.rank :: ranks.world_size][start : start + 2] for start in range(0, ROWS, 2)]
    for rows in batches:  # the last are empty on ranks that have run out
        scorer.update(None, {} if rows else None, rows)
    try:
        scores = scorer.result()
    except UserError as error:
        return str(error)
    return scores.metrics, scores.items.get("record")


@pytest.mark.parametrize("world_size", [1, 3])
def test_records_come_in_the_order_of_the_samples_whoever_kept_them(world_size: int, tmp_path: Path) -> None:
    outcomes = run_on_ranks(scored, world_size, tmp_path, "all")
    wanted = [(row, word) for row in range(ROWS) for word in ("first", "second")]
    assert outcomes[0] == ({"records": 2 * ROWS}, wanted)
    assert outcomes[1:] == [({"records": 2 * ROWS}, None)] * (world_size - 1)


def test_what_cannot_be_scored_is_said_on_all_ranks(tmp_path: Path) -> None:
    assert run_on_ranks(scored, 2, tmp_path, "nothing") == ["words: nothing to score"] * 2


def test_retrieval_on_a_split_without_a_caption_is_refused_in_one_line(tmp_path: Path) -> None:
    assert run_on_ranks(_without_text, 2, tmp_path) == ["retrieval: no video of this split has a caption"] * 2


def _without_text(ranks: Ranks) -> str:
    scorer = RetrievalScorer(None, SimpleNamespace(ranks=ranks, name="retrieval", sample=None))  # type: ignore[arg-type]
    frames = torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    scorer.videos.append(([2 * ranks.rank, 2 * ranks.rank + 1], frames))
    try:
        scorer.embeddings()
    except UserError as error:
        return str(error)
    return "embedded"
