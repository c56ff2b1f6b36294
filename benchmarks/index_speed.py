"""Nearest-neighbour search among a million vectors: FAISS as in `emcl index`, NumPy, torch, exact FAISS and HNSW.

    python benchmarks/index_speed.py [--vectors 1000000] [--width 512] [--hnsw]

Random unit vectors are the hardest case: there are no clusters, and the tenth nearest is hardly nearer than the
thousandth. `ours` is the search above EXACT windows: the 1,000 nearest among 8-bit vectors, re-ranked by the exact
vectors. Each side runs in a separate process and opens an index built before. Its memory is measured after the
searches, without the libraries; pages of memory-mapped files are listed separately, because the kernel can reclaim
them. HNSW takes long to build.
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

from emcl.search.index import CANDIDATES, EXACT, faiss_package, vectors_for

QUERIES, TOP = 200, 10
SIDES = ("ours", "exact FAISS", "NumPy", "torch")

Search = Callable[[np.ndarray], np.ndarray]
"""One query (width,) -> numbers of the TOP nearest."""


def unit(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = rng.standard_normal((count, width), dtype=np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make(folder: Path, count: int, width: int) -> None:
    """Writes the vectors, the queries and their exact nearest neighbours."""
    rng = np.random.default_rng(0)
    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.float32, (count, width))
    for first in range(0, count, 100_000):
        rows[first : first + 100_000] = unit(rng, min(100_000, count - first), width)
    queries = unit(rng, QUERIES, width)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "right.npy", np.argsort(-(queries @ rows.T), axis=1)[:, :TOP])


def build(side: str, folder: Path, count: int, width: int) -> float:
    """Builds the index and returns the seconds; 0 for NumPy and torch, which have none."""
    faiss, rows = faiss_package(), np.load(folder / "rows.npy", mmap_mode="r")
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


def measure(side: str, folder: Path, count: int, width: int) -> dict[str, float]:
    seconds = build(side, folder, count, width)
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
    parser.add_argument("--hnsw", action="store_true")
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
        make(folder, options.vectors, options.width)
        results = {}
        for side in (*SIDES, *(["HNSW"] if options.hnsw else [])):
            results[side] = measure(side, folder, options.vectors, options.width)
            print(side, json.dumps(results[side]), flush=True)
    print(f"\n| | {' | '.join(results['ours'])} |")
    print("|---" * (1 + len(results["ours"])) + "|")
    for side, facts in results.items():
        print(f"| {side} | {' | '.join(f'{value:,}' for value in facts.values())} |")


if __name__ == "__main__":
    main()
