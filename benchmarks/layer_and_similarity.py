"""EMCL beside its formulas written as they stand: `python benchmarks/layer_and_similarity.py`.

Each figure comes from a process of its own, so that its peak memory is its own; sides alternate, and medians are
compared. D = 512, T = 12 frames, K = 32, 9 iterations, fp32. The layer forward, fitting included but for `fitted` (a
compact layer in evaluation); the similarity forward and backward.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

D, T, K, ITERATIONS = 512, 12, 32, 9
BATCHES = (128, 512, 2048)
ROWS = 16_512
"""Of EMCL-Net's training step: 128 x 128 pooled rows and 128 texts."""
PLAIN_COPIES = 8
"""A x B x D tensors that the plain formulas hold at their peak, about."""


def measure(side: str, item: str, size: int) -> dict[str, float]:
    """One process's work: seconds, and the peak of memory above what it had before (MiB)."""
    import torch

    from emcl.em import EMCL
    from emcl.model.similarity import similarity
    from straightforward import reference_em, reference_similarity

    torch.manual_seed(0)
    variant = "compact" if side in ("compact", "fitted") else "reference"
    layer = EMCL(bases=K, iterations=ITERATIONS, variant=variant, width=D)
    if item == "layer":
        x = 10 * torch.nn.functional.normalize(torch.randn(size, D) + torch.randn(D), dim=-1)
        layer.fit(x[:2000]).eval() if side == "fitted" else layer.train()
        plain, ours = (lambda: x + 3 * reference_em(x, layer.mu)), (lambda: layer(x)[0])
        work = torch.no_grad()(plain if side == "plain" else ours)
    else:
        text = torch.randn(size, D, requires_grad=True)
        frames = torch.randn(size, T, D, requires_grad=True)
        mask = torch.ones(size, T, dtype=torch.bool)

        def work() -> torch.Tensor:
            text.grad = frames.grad = None
            if side == "plain":
                scores = reference_similarity(text, frames, mask, layer.mu, temperature=3.0, beta=3.0)
            else:
                scores = similarity(text, frames, mask, temperature=3.0, emcl=layer)
            scores.square().mean().backward()
            return scores

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    work()
    first = time.perf_counter() - began
    rounds = 1 if first > 5 else 5
    times = []
    for _ in range(rounds if first < 60 else 0):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": statistics.median(times or [first]), "mib": peak / 1024}


def in_process(side: str, item: str, size: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", side, item, str(size)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def bandwidth() -> float:
    """Bytes a second that this machine copies."""
    import torch

    x = torch.empty(2**26)
    y = torch.empty_like(x)
    y.copy_(x)
    began = time.perf_counter()
    for _ in range(5):
        y.copy_(x)
    return 5 * 2 * x.numel() * 4 / (time.perf_counter() - began)


def compare(item: str, size: int, repeats: int) -> dict[str, object]:
    """Ours and the plain side alternated; the plain one is left out where it cannot fit."""
    import psutil

    fits = item == "layer" or PLAIN_COPIES * size * size * D * 4 < psutil.virtual_memory().available
    sides = [*(["plain"] if fits else []), "reference", "compact", *(["fitted"] if item == "layer" else [])]
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side in sides:
            found[side].append(in_process(side, item, size))
    medians = {
        side: {key: statistics.median(one[key] for one in all_) for key in ("seconds", "mib")}
        for side, all_ in found.items()
    }
    return {"item": item, "size": size, "repeats": repeats, "plain_fits": fits, **medians}


def row(result: dict) -> str:
    cells = [f"{result['item']} {result['size']:,}"]
    for side in ("plain", "reference", "compact", "fitted"):
        if side in result:
            cells.append(f"{result[side]['seconds']:.3f} s, {result[side]['mib']:,.0f} MiB")
        elif side == "fitted":
            cells.append("")
        else:
            cells.append(f"does not fit (about {PLAIN_COPIES * result['size'] ** 2 * D * 4 / 2**30:.0f} GiB)")
    ratio = ""
    if "plain" in result:
        faster = result["plain"]["seconds"] / result["reference"]["seconds"]
        smaller = result["plain"]["mib"] / max(1.0, result["reference"]["mib"])
        ratio = f"{faster:.1f} x as fast, {smaller:.1f} x less memory"
    return f"| {' | '.join([*cells, ratio])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--items", nargs="+", choices=("layer", "similarity"), default=["layer", "similarity"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/layer_and_similarity.json"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        side, item, size = options.one
        print(json.dumps(measure(side, item, int(size))))
        return
    results = [compare("layer", ROWS, options.repeats)] if "layer" in options.items else []
    if "similarity" in options.items:
        results += [compare("similarity", batch, options.repeats if batch < 2048 else 1) for batch in BATCHES]
    heads = ("", "formulas as they stand", "reference", "compact", "fitted", "reference against the formulas")
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for result in results:
        print(row(result))
    floor = 2 * ROWS * D * 4 / bandwidth()  # rows read once and written once
    print(f"\nlayer, memory-bandwidth floor: {1000 * floor:.1f} ms (rows read once, written once)")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"floor_seconds": floor, "results": results}, indent=1))


if __name__ == "__main__":
    main()
