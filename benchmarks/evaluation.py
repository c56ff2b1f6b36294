"""Similarity and metrics of many texts and videos, compared with plain implementations on whole matrices.

`EMCL-Net` measures the similarity with the layer (text-conditioned pooling, 12 frames, width 512) and all metrics,
compared with a direct implementation of the formulas. `metrics` measures only the metrics of a given similarity: ranks
of both directions, with DSL and with QB-Norm, in blocks, compared with sorting and rescoring the whole matrix. Memory
is the peak beyond the inputs, in a separate process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from emcl.metrics.rescoring import DualSoftmax, QueryBank
from emcl.metrics.retrieval_metrics import retrieval_metrics, text_to_video_ranks
from timing import Row, in_process, script, seconds_and_memory

WIDTH, FRAMES, BANK = 512, 12, 1000
SIZES = ((1000, 1000), (10_000, 10_000))
LARGEST = (100_000, 10_000)
"""Measured only for our implementation."""


def plain_ranks(scores: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Sorts every row completely, as published evaluation code does."""
    order = np.argsort(-scores, axis=1)
    return 1 + np.nonzero(order == owner[:, None])[1]


def plain_metrics(scores: np.ndarray, bank: np.ndarray, owner: np.ndarray) -> None:
    plain_ranks(scores, owner)
    plain_ranks(scores.T, np.arange(scores.shape[1]))
    softmax = np.exp(scores / 0.01 - (scores / 0.01).max(0))
    plain_ranks(scores * (softmax / softmax.sum(0)), owner)
    normalised = np.exp(20 * scores) / np.exp(20 * bank).sum(0)
    plain_ranks(np.where((bank.argmax(1)[:, None] == np.arange(scores.shape[1])).any(0), normalised, scores), owner)


def metrics(side: str, texts: int, videos: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((texts, videos), dtype=np.float32)
    scores /= 10  # in place: a copy would hide the peak
    bank = rng.standard_normal((BANK, videos), dtype=np.float32) / 10
    owner = np.arange(texts) % videos
    before, began = _peak(), time.perf_counter()
    if side == "plain":
        plain_metrics(scores, bank, owner)
    else:
        retrieval_metrics(scores, owner)
        text_to_video_ranks(scores, owner, rescore=DualSoftmax())
        text_to_video_ranks(scores, owner, rescore=partial(QueryBank(), bank_BG=bank))
    return {"seconds": time.perf_counter() - began, "mib": max(1.0, _peak() - before)}


def similarity(side: str, texts: int, videos: int) -> dict[str, float]:
    import torch  # here, because processes that measure only metrics start faster without it

    from emcl.distributed import ALONE
    from emcl.model.emcl_layer import EMCLLayer
    from straightforward import reference_similarity

    torch.manual_seed(0)
    text, frames = torch.randn(texts, WIDTH), torch.randn(videos, FRAMES, WIDTH)
    mask = torch.ones(videos, FRAMES, dtype=torch.bool)
    layer = EMCLLayer(bases=32, width=WIDTH).eval()
    task = retrieval_task() if side == "ours" else None
    before, began = _peak(), time.perf_counter()
    with torch.no_grad():
        if task is None:
            scores = torch.zeros(texts, videos)
            for row in range(0, texts, 32):
                for column in range(0, videos, 32):
                    here = slice(row, row + 32), slice(column, column + 32)
                    scores[here] = reference_similarity(
                        text[here[0]], frames[here[1]], mask[here[1]], layer.mu, temperature=3.0, beta=3.0
                    )
        else:
            scores = task.similarity_in_tiles(text, frames, mask, 32, ranks=ALONE, layer=layer)
        retrieval_metrics(np.asarray(scores))
    return {"seconds": time.perf_counter() - began, "mib": max(1.0, _peak() - before)}


def retrieval_task() -> Any:
    from emcl.tasks.retrieval import RetrievalTask

    from emcl.config import resolve

    config = resolve(["retrieval"], "sample", ["emcl.enabled=false"])
    backbone: Any = SimpleNamespace(embed_dim=WIDTH, initial_logit_scale=1.0)
    return RetrievalTask(config.tasks["retrieval"], config, backbone).eval()


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rows_of(what: str, texts: int, videos: int, repeats: int) -> list[Row]:
    def one(side: str) -> dict[str, float]:
        return in_process(__file__, what, side, texts, videos)

    return seconds_and_memory("evaluation", f"{what}, {texts:,} x {videos:,}", ("ours", "plain"), one, repeats)


def measure(repeats: int) -> list[Row]:
    rows = rows_of("EMCL-Net", 1000, 1000, repeats)
    for texts, videos in SIZES:
        rows += rows_of("metrics", texts, videos, repeats if texts < 10_000 else 1)
    texts, videos = LARGEST
    alone = in_process(__file__, "metrics", "ours", texts, videos)
    case = f"metrics, {texts:,} x {videos:,}"
    note = "the whole matrix several times does not fit here"
    rows.append(Row("evaluation", case, "s", alone["seconds"], {}, None, note=note))
    rows.append(Row("evaluation", f"{case}, memory", "MiB", alone["mib"], {}, None, note=note))
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        what, side, *size = sys.argv[2:]
        print(json.dumps((metrics if what == "metrics" else similarity)(side, int(size[0]), int(size[1]))))
    else:
        script(__doc__, measure, "evaluation")
