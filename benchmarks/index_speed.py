"""Nearest-neighbour search among a million vectors: FAISS as in `emcl index`, NumPy, torch, exact FAISS and HNSW.

    python benchmarks/index_speed.py [--vectors 1000000] [--width 512] [--factors 128] [--hnsw]

Random unit vectors are the hardest case: there are no clusters, and the tenth nearest is hardly nearer than the
thousandth. `ours` is the search above EXACT windows: the 1,000 nearest among 8-bit vectors, re-ranked by the exact
vectors. Each side runs in a separate process and opens an index built before. Its memory is measured after the
searches, without the libraries; pages of memory-mapped files are listed separately, because the kernel can reclaim
them. HNSW takes long to build. With `--factors K` vectors have the K + 2 numbers of shared factors too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from emcl.search.index import CANDIDATES
from emcl.search.vectors import EXACT, STEP, faiss_package, filled, vectors_for

QUERIES, TOP = 200, 10
SCALE = 20.0
"""What a learnt exp(logit_scale) is near."""
SIDES = ("ours", "exact FAISS", "NumPy", "torch")

Search = Callable[[np.ndarray], np.ndarray]
"""One query (width,) -> numbers of the TOP nearest."""


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = rng.standard_normal((count, width), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def of_factors(rng: np.random.Generator, count: int, factors: int, *, queries: bool) -> np.ndarray:
    """(count, K + 2) of random codes, as an index has them: correlations fall from 0.8 to 0.1, log-odds by SCALE."""
    if not factors:
        return np.empty((count, 0), np.float32)
    r = np.geomspace(0.8, 0.1, factors, dtype=np.float32)
    codes = rng.standard_normal((count, factors), dtype=np.float32)
    square = -(codes**2 @ (r**2 / (1 - r**2) / 2))[:, None]
    last = [np.ones_like(square), square] if queries else [square, np.ones_like(square)]
    vectors = np.concatenate([np.sqrt(r / (1 - r**2)) * codes, *last], 1)
    return vectors / SCALE if queries else vectors


def make(folder: Path, count: int, width: int, factors: int) -> None:
    """Writes the vectors, the queries and their exact nearest neighbours."""
    rng = np.random.default_rng(0)
    vectors = width + (factors + 2 if factors else 0)
    whole = vectors + -vectors % STEP
    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float32, (count, whole))
    for first in range(0, count, 100_000):
        here = min(100_000, count - first)
        rows[first : first + here, :width] = unit(rng, here, width)
        rows[first : first + here, width:vectors] = of_factors(rng, here, factors, queries=False)
    queries = np.concatenate([unit(rng, QUERIES, width), of_factors(rng, QUERIES, factors, queries=True)], 1)
    queries = filled(queries)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "right.npy", np.argsort(-(queries @ rows.T), axis=1)[:, :TOP])


def build(side: str, folder: Path) -> float:
    """Builds the index and returns the seconds; 0 for NumPy and torch, which have none."""
    faiss, rows = faiss_package(), np.load(folder / "rows.npy", mmap_mode="r")
    count, width = rows.shape
    began = time.perf_counter()
    if side == "ours":
        index: Any = vectors_for(count, width)
    elif side == "exact FAISS":
        index = faiss.IndexIDMap2(faiss.IndexFlatIP(width))
    elif side == "HNSW":
        index = faiss.IndexIDMap2(faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT))
    else:
        return 0.0
    index.train(np.asarray(rows[:4096]))
    for first in range(0, count, 4096):
        block = np.asarray(rows[first : first + 4096])
        index.add_with_ids(block, np.arange(first, first + len(block)))
    faiss.write_index(index, str(folder / f"{side}.faiss"))
    return time.perf_counter() - began


def opened(side: str, folder: Path) -> Search:
    if side == "NumPy":
        rows = np.load(folder / "rows.npy")

        def by_numpy(query: np.ndarray) -> np.ndarray:
            scores = rows @ query
            best = np.argpartition(-scores, TOP)[:TOP]
            return best[np.argsort(-scores[best])]

        return by_numpy
    if side == "torch":
        import torch

        tensor = torch.from_numpy(np.load(folder / "rows.npy"))
        return lambda query: (tensor @ torch.from_numpy(query)).topk(TOP).indices.numpy()
    faiss = faiss_package()
    index = faiss.read_index(str(folder / f"{side}.faiss"), faiss.IO_FLAG_MMAP_IFC)
    if side == "HNSW":
        faiss.downcast_index(index.index).hnsw.efSearch = 256
    if side != "ours":
        return lambda query: index.search(query[None], TOP)[1][0]
    exact = np.load(folder / "rows.npy", mmap_mode="r")

    def two_steps(query: np.ndarray) -> np.ndarray:
        near = np.sort(index.search(query[None], CANDIDATES)[1][0])
        scores = exact[near] @ query
        return near[np.argsort(-scores)[:TOP]]

    return two_steps


def measure(side: str, folder: Path) -> dict[str, float]:
    seconds = build(side, folder)
    size = (folder / f"{side}.faiss").stat().st_size if seconds else 0
    command = [sys.executable, __file__, "--one", side, "--folder", str(folder)]
    searched = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return {"build s": round(seconds, 1), "file MiB": round(size / 2**20), **searched}


def one(side: str, folder: Path) -> dict[str, float]:
    import torch

    torch.ones(1)
    process = psutil.Process(os.getpid())
    before = process.memory_info()
    search, queries, right = opened(side, folder), np.load(folder / "queries.npy"), np.load(folder / "right.npy")
    for query in queries[:5]:
        search(query)
    times, hits = [], 0
    for query, nearest in zip(queries, right, strict=True):
        began = time.perf_counter()
        numbers = search(query)
        times.append(time.perf_counter() - began)
        hits += len(set(numbers.tolist()) & set(nearest.tolist()))
    after = process.memory_info()
    mapped = after.shared - before.shared
    return {
        "MiB of its own": round((after.rss - before.rss - mapped) / 2**20),
        "MiB mapped": round(mapped / 2**20),
        f"recall@{TOP}": round(hits / right.size, 4),
        "median ms": round(1000 * statistics.median(times), 1),
        "99th percentile ms": round(1000 * sorted(times)[int(0.99 * len(times))], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--factors", type=int, default=0)
    parser.add_argument("--hnsw", action="store_true")
    parser.add_argument("--only", choices=SIDES, nargs="+", default=SIDES)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.folder)))
        return
    if options.vectors <= EXACT:
        parser.error(f"up to {EXACT:,} windows a search is exact: give more --vectors")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, options.vectors, options.width, options.factors)
        results = {}
        for side in (*options.only, *(["HNSW"] if options.hnsw else [])):
            results[side] = measure(side, folder)
            print(side, json.dumps(results[side]), flush=True)
    columns = next(iter(results.values()))
    print(f"\n| | {' | '.join(columns)} |")
    print("|---" * (1 + len(columns)) + "|")
    for side, facts in results.items():
        print(f"| {side} | {' | '.join(f'{value:,}' for value in facts.values())} |")


if __name__ == "__main__":
    main()
