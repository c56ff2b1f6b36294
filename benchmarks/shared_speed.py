"""Shared factors beside the plain formulas on whole matrices: fitting, and scoring texts with videos.

The size is that of MSR-VTT: 9,000 videos with 20 sentences each, K = 128, T = 4; features of EfficientNet-lite0 and
MiniLM (1,280 and 384 wide), and of CLIP ViT-B (512 and 512). `folds` is a fit that chooses its shrinkage.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial

from timing import Row, alternate, compared, in_process, script, seconds_and_memory

VIDEOS, SENTENCES, FACTORS = 9_000, 20, 128
WIDTHS = {"lite0 and MiniLM": (1280, 384), "CLIP ViT-B": (512, 512)}
SCORED = 1_000
SHRINKAGE = (1.0, 0.3)
PLAIN, FOLDS = "the formulas", "folds"


def one(side: str, item: str, model: str) -> dict[str, float]:
    """Runs in a separate process: seconds, and peak memory above the level before (MiB)."""
    import resource

    import torch

    from emcl.em import SharedFactors
    from straightforward import shared_factors

    g = torch.Generator().manual_seed(0)
    wide, narrow = WIDTHS[model]
    videos = VIDEOS if item == "fit" else SCORED
    owner = torch.arange(videos).repeat_interleave(SENTENCES)
    variance = torch.arange(1, 257) ** -0.5  # falls slowly, in what is shared and in what is not
    z = torch.randn(videos, 256, generator=g) * variance
    video, text = (
        (rows + 2 * torch.randn(rows.shape, generator=g) * variance) @ torch.randn(256, width, generator=g)
        for rows, width in ((z, wide), (z[owner], narrow))
    )
    shrinkage = None if side == FOLDS else SHRINKAGE

    def fit():  # type: ignore[no-untyped-def]
        if side == PLAIN:
            given = video.double(), text.double(), owner
            return shared_factors(*given, bases=FACTORS, iterations=4, shrinkage=SHRINKAGE)
        return SharedFactors(bases=FACTORS, shrinkage=shrinkage).fit(video, text, owner)

    work = fit
    if item == "score":
        score = fit() if side == PLAIN else fit().score
        queries = text[::SENTENCES]
        work = lambda: score(queries.double(), video.double()) if side == PLAIN else score(queries, video)  # noqa: E731
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def measure(repeats: int) -> list[Row]:
    rows = []
    for model in WIDTHS:

        def in_turn(side: str, item: str = "fit", model: str = model) -> dict[str, float]:
            return in_process(__file__, side, item, model)

        case = f"fit {VIDEOS:,} videos, {VIDEOS * SENTENCES:,} sentences, {model}"
        rows += seconds_and_memory("shared factors", case, ("ours", PLAIN, FOLDS), in_turn, repeats)
        sides = {side: partial(_seconds, in_turn, side) for side in ("ours", PLAIN)}
        rows.append(
            compared("shared factors", f"score {SCORED:,} x {SCORED:,}, {model}", "s", alternate(sides, repeats))
        )
    return rows


def _seconds(in_turn: Callable[[str, str], dict[str, float]], side: str) -> float:
    return in_turn(side, "score")["seconds"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(*sys.argv[2:5])))
    else:
        script(__doc__, measure, "shared_speed")
