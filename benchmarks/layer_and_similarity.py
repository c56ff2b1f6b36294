"""EMCL compared with a direct implementation of its formulas: the layer alone, and the similarity by global batch.

Each figure comes from a separate process, so that peak memory is measured per figure. D = 512, T = 12 frames, K = 32, 9
iterations, fp32. The layer is timed forward, including fitting except for `compact, fitted` (evaluation mode); the
similarity forward and backward. `the formulas` store A x B x D numbers; if they do not fit, only ours is measured.
`copying the rows` is a lower bound for the layer.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time

from timing import Row, in_process, script, seconds_and_memory

D, T, K, ITERATIONS = 512, 12, 32, 9
BATCHES = (128, 512, 2048)
COMPACT = bool(os.environ.get("EMCL_BENCH_COMPACT"))
"""Whether to measure the compact variant as well."""
ROWS = 16_512
"""Rows in EMCL-Net's training step: 128 x 128 pooled rows and 128 texts."""
PLAIN_COPIES = 8
"""Approximate number of A x B x D tensors that the plain formulas store at their peak."""
PLAIN, FITTED, COPY = "the formulas", "compact, fitted", "copying the rows"


def one(side: str, item: str, size: int) -> dict[str, float]:
    """Runs in a separate process: seconds, and peak memory above the level before (MiB)."""
    import torch

    from emcl.model.emcl_layer import EMCLLayer
    from emcl.model.similarity import similarity
    from straightforward import reference_em, reference_similarity

    torch.manual_seed(0)
    variant = "compact" if "compact" in side else "reference"
    layer = EMCLLayer(bases=K, iterations=ITERATIONS, variant=variant, width=D)
    if item == "layer":
        x = 10 * torch.nn.functional.normalize(torch.randn(size, D) + torch.randn(D), dim=-1)
        layer.fit(x[:2000]).eval() if side == FITTED else layer.train()
        target = torch.zeros_like(x) if side == COPY else x
        works = {PLAIN: lambda: x + 3 * reference_em(x, layer.mu), COPY: lambda: target.copy_(x)}
        work = torch.no_grad()(works.get(side, lambda: layer(x)[0]))
    else:
        text = torch.randn(size, D, requires_grad=True)
        frames = torch.randn(size, T, D, requires_grad=True)
        mask = torch.ones(size, T, dtype=torch.bool)

        def work() -> torch.Tensor:
            text.grad = frames.grad = None
            if side == PLAIN:
                scores = reference_similarity(text, frames, mask, layer.mu, temperature=3.0, beta=3.0)
            else:
                scores = similarity(text, frames, mask, temperature=3.0, regulariser=layer)
            scores.square().mean().backward()
            return scores

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    work()
    first = time.perf_counter() - began
    times = []
    for _ in range(min(5, int(5 / first))):  # if one call takes long, the first is the figure
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(times or [first]), "mib": peak / 1024}


def rows_of(item: str, size: int, repeats: int) -> list[Row]:
    """Time and memory of ours, of the formulas if they fit, and of the compact variant if requested."""
    import psutil

    fits = item == "layer" or PLAIN_COPIES * size * size * D * 4 < psutil.virtual_memory().available
    others = [PLAIN] if fits else []
    if item == "layer":
        others.append(COPY)
    if COMPACT:
        others += ["compact", FITTED] if item == "layer" else ["compact"]
    case = f"similarity, global batch {size:,}" if item == "similarity" else f"layer alone, {size:,} rows"
    note = "" if fits else f"the formulas take about {PLAIN_COPIES * size**2 * D * 4 / 2**30:.0f} GiB"

    def in_turn(side: str) -> dict[str, float]:
        return in_process(__file__, side, item, size)

    sides = ("ours", *others)
    return seconds_and_memory("EMCL", case, sides, in_turn, repeats, without_memory=COPY, note=note)


def measure(repeats: int) -> list[Row]:
    rows = rows_of("layer", ROWS, repeats)
    for batch in BATCHES:
        rows += rows_of("similarity", batch, repeats if batch < BATCHES[1] else 1)
    return rows


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(one(sys.argv[2], sys.argv[3], int(sys.argv[4]))))
    else:
        script(__doc__, measure, "layer_and_similarity")
