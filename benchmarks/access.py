"""The cost of reading 12 frames from a video, against its length: `python benchmarks/access.py`.

Compares 12 frames spread over the whole video, and 12 frames from four seconds at three quarters of it, with decoding
everything. One clip is repeated, with a key frame every two seconds; one thread; median of several repeats.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av

from emcl.data.decode import decode
from loading import FRAMES, REAL, repeated

LENGTHS = (5, 10, 20, 40, 80, 160)
SIZE = 224


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times)


def everything(video: bytes) -> int:
    with av.open(io.BytesIO(video), "r") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        return len([frame.pts for frame in container.decode(stream)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, default=next(iter(sorted(REAL.glob("*.mp4"))), None))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/access.png"))
    options = parser.parse_args()
    times: dict[str, list[float]] = {"everything": [], "12 frames over the whole": [], "12 frames of 4 s in it": []}
    with tempfile.TemporaryDirectory() as folder:
        for seconds in LENGTHS:
            video = repeated(options.video, seconds, Path(folder) / f"{seconds}.mp4").read_bytes()
            start = 0.75 * seconds - 2
            sides: dict[str, Callable[[], object]] = {
                "everything": lambda video=video: everything(video),  # type: ignore[misc]
                "12 frames over the whole": lambda video=video: decode(video, frames=FRAMES, size=SIZE),  # type: ignore[misc]
                "12 frames of 4 s in it": lambda video=video, start=start: decode(  # type: ignore[misc]
                    video, frames=FRAMES, size=SIZE, start=start, end=start + 4
                ),
            }
            for name, work in sides.items():
                times[name].append(milliseconds(work, options.repeats))
    print("seconds of video" + "".join(f"{seconds:>8}" for seconds in LENGTHS))
    for name, values in times.items():
        print(f"{name:<26}" + "".join(f"{value:>8.0f}" for value in values) + "  ms")
    draw(times, options.out)


def draw(seconds: dict[str, list[float]], out: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name, values in seconds.items():
        axes.plot(LENGTHS, values, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="seconds of video", ylabel="ms a clip")
    axes.set_xticks(LENGTHS, [str(seconds) for seconds in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
