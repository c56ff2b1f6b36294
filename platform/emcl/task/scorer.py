"""How a task is scored: records of each batch of an evaluation, and the scores computed from all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emcl.config import Config
from emcl.data.samples import Sample
from emcl.data.split import Split
from emcl.distributed import Ranks
from emcl.em import SharedFactors
from emcl.errors import UserError, said_of
from emcl.model.backbone import Backbone, Encoded
from emcl.pictures import FramesOf

Picture = Callable[[Path, FramesOf], None]
"""Draws to a path."""
Record = tuple[int, Any]
"""A sample's row in the shards, and the result for it, or for one query about it; picklable."""


@dataclass(frozen=True)
class Scores:
    """A task's result on one split, the same on every rank except for pictures and files, which rank 0 has."""

    metrics: dict[str, float]
    protocol: str
    """In words: what was compared with what, with which options, how many queries."""
    chosen: str
    """The entry of `metrics` that chooses the best checkpoint."""
    picture: Picture | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Contents of further files to keep, by name; `{split}` in it is filled in (`RunFolder.kept`)."""
    items: dict[str, list[Any]] = field(default_factory=dict)
    """The result of each query, column by column. A column named as a metric gives its interval, `id` says which
    queries are of one sample; the task's report shows the others."""
    save: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)
    """Further files to keep of the test split, each written to a path; names as in `files`."""


class Lockstep:
    """Runs a module over any number of rows in chunks, as many chunks on every rank as on the one with most.

    Under ZeRO-3 each forward pass is a collective: a rank that has no rows left runs a filler with the others.
    """

    def __init__(self, model: nn.Module, ranks: Ranks, size: int, device: torch.device) -> None:
        self.model, self.ranks, self.size, self.device = model, ranks, size, device

    def __call__(self, call: Callable[..., Tensor], rows: Sequence[Tensor] | None, filler: Sequence[Tensor]) -> Tensor:
        """`call(*rows)` for rows of equal length, concatenated; empty where there are none."""
        own_chunks = [] if rows is None else list(zip(*(tensor.split(self.size) for tensor in rows), strict=True))
        chunks = int(self.ranks.maximum(torch.tensor(len(own_chunks), device=self.device)))
        done = [self.model(call=partial(call, *chunk)) for chunk in own_chunks]
        spare = [self.model(call=partial(call, *filler)) for _ in range(chunks - len(own_chunks))]
        return torch.cat(done or [spare[0][:0]]) if done or spare else torch.zeros(0, device=self.device)


@dataclass(frozen=True)
class Evaluation:
    """One task's evaluation: what its scorer works with besides a batch."""

    name: str
    """The task's, by which the run knows it."""
    model: nn.Module
    backbone: Backbone
    split: Split
    config: Config
    ranks: Ranks
    device: torch.device
    lockstep: Lockstep
    factors: SharedFactors | None = None
    """Of the model, which scores of texts and videos are to be told by too; `Encoded.outputs_BW` is filled then."""

    def encode_text(self, text: Tensor | None) -> Tensor:
        """Texts as a collator gives them to (n, D), in chunks; called by all ranks, with None by one that has none."""
        return self._in_lockstep(self.backbone.encode_text, text, self.split.filler())

    def text_outputs(self, text: Tensor | None) -> Tensor:
        """As `encode_text`, what the text trunk puts out, before the head: (n, W)."""
        return self._in_lockstep(self.backbone.text_outputs, text, self.split.filler())

    def encode_text_with_outputs(self, text: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both, by one pass."""
        outputs = self.text_outputs(text)
        filler = torch.zeros(1, self.backbone.text.width)
        return self._in_lockstep(self.backbone.encode_text, None if text is None else outputs, filler), outputs

    def _in_lockstep(self, call: Callable[[Tensor], Tensor], text: Tensor | None, filler: Tensor) -> Tensor:
        return self.lockstep(call, None if text is None else (text,), (filler.to(self.device),))

    def run(self, call: Callable[[], Any]) -> Any:
        """`call()` within a forward pass of the whole model, as ZeRO-3 needs; on all ranks."""
        return self.model(call=call)

    def sample(self, row: int) -> Sample:
        """The sample of a row of the shards."""
        return self.split.sample(row)

    @property
    def title(self) -> str:
        """The title of a picture."""
        return f"{self.name}: {self.config.model.name}"


class Scorer:
    """Keeps records batch by batch, on each rank those of its own samples; then scores those of all ranks.

    A task's own scorer defines `update` and `compute`. Records are gathered here, in the order of the samples, so that
    a score does not depend on the number of ranks.
    """

    def __init__(self, task: Any, evaluation: Evaluation) -> None:
        self.task, self.evaluation = task, evaluation
        self.records: list[Record] = []

    def update(self, encoded: Encoded, inputs: Any | None, rows: Sequence[int]) -> None:
        """Adds one batch's records.

        All ranks make the same number of calls. One that has run out of samples gets one encoded filler, no `inputs`
        and no `rows`: it takes part in the others' forward passes (`evaluation.run`, `evaluation.lockstep`) and adds
        nothing.

        Args:
            inputs: what the task's collator made for the batch.
            rows: the row in the shards of each encoded video.
        """
        raise NotImplementedError

    def compute(self, records: Any) -> Scores:
        """The scores of all records; on rank 0 alone, so it must not communicate with other ranks.

        Args:
            records: what `gather` gave.

        Raises:
            UserError: nothing can be scored, such as a split without a caption; raised on all ranks.
        """
        raise NotImplementedError

    def factor_weight(self, weights: Sequence[float]) -> float:
        """By which of them the model's shared factors should count, judged by the records; called by all ranks.

        For a scorer that adds them to its scores (`Evaluation.factors`); others leave it as it is.
        """
        return 0.0

    def gather(self) -> Any:
        """What `compute` takes, on rank 0; called by all ranks: here, all records in the order of their rows."""
        everyone = self.evaluation.ranks.collect_objects(self.records)
        return sorted((record for of_rank in everyone or () for record in of_rank), key=lambda record: record[0])

    def result(self) -> Scores:
        """Called once, by all ranks."""
        ranks, gathered = self.evaluation.ranks, self.gather()
        scores, error = None, None
        if ranks.first:
            try:
                with said_of(self.evaluation.name):
                    scores = self.compute(gathered)
            except UserError as wrong:
                error = wrong
        ranks.agree(error)
        shared = ranks.from_first((scores.metrics, scores.protocol, scores.chosen) if scores else None)
        return scores or Scores(*shared)
