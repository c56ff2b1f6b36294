"""Clips per second of `emcl prepare`, re-encoding with its defaults (short side 256, 3 frames per second).

Compared with the floor (as many processes that decode, scale and encode the same frames with PyAV and write nothing),
and with one process instead of two. Each process imports this file again, so it imports only what they need.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from fractions import Fraction
from multiprocessing import get_context
from pathlib import Path

from emcl.data.decode import resampled
from emcl.prepare.sharding import Options, prepare_shards
from emcl.prepare.table import read_table
from emcl.prepare.videos import Videos
from emcl.prepare.writer import encode_mp4
from timing import Row, alternate, compared, script

CLIPS, SECONDS = 40, 20.0


def transcode(file: str) -> int:
    video = Path(file).read_bytes()
    return len(encode_mp4(resampled(video, Fraction(3)), Fraction(3), short_side=256))


def measure(repeats: int) -> list[Row]:
    from loading import REAL, repeated

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "videos").mkdir()
        sources = sorted(REAL.glob("*.mp4")) if REAL.is_dir() else []
        if not sources:
            from emcl.data.shards import open_shards
            from emcl.prepare.sample_set import generate

            generate(root / "sample", counts={"train": 1, "val": 0, "test": 0}, seed=0, progress=False)
            shards = open_shards(f"{root}/sample/train-*.tar")
            sources = [root / "source.mp4"]
            sources[0].write_bytes(shards.read(shards.rows[0]))
        first = repeated(sources[0], SECONDS, root / "videos" / "clip0.mp4")
        for number in range(1, CLIPS):
            shutil.copy(first, root / "videos" / f"clip{number}.mp4")
        lines = ["file,caption", *(f"clip{number}.mp4,a clip" for number in range(CLIPS))]
        (root / "table.csv").write_text("\n".join(lines))
        table = read_table(root / "table.csv")
        files = [str(path) for path in sorted((root / "videos").iterdir())]

        def prepare(processes: int) -> float:
            shutil.rmtree(root / "out", ignore_errors=True)
            began = time.perf_counter()
            options = Options(processes=processes, progress=False)
            prepare_shards(table, Videos(root / "videos"), root / "out", options, source="bench")
            return CLIPS / (time.perf_counter() - began)

        def floor(processes: int) -> float:
            began = time.perf_counter()
            with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
                list(pool.map(transcode, files))
            return CLIPS / (time.perf_counter() - began)

        sides = {"ours": lambda: prepare(2), "one process": lambda: prepare(1), "bare PyAV": lambda: floor(2)}
        prepare(2)  # warm-up: libraries
        targets = {"one process": ">= 1.8", "bare PyAV": ">= 0.9"}
        return [compared("prepare", "20 s clips, two processes", "clips/s", alternate(sides, repeats), targets=targets)]


if __name__ == "__main__":
    script(__doc__, measure, "preparing")
