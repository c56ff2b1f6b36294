"""Frames a second of the whole loader, beside decoding alone and beside a loader as the field writes it.

Ours: tar, decode 12 frames a clip, resize, crop, collate, hand over, two workers. `bare PyAV`: the floor; as many
processes decode up to the last of the same frames, and nothing else. `the field's`: a Dataset of single files that
OpenCV seeks frame by frame, PIL and torchvision transforms, normalised float32, PyTorch's DataLoader, two workers.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from emcl.config import DataConfig
from emcl.data.loader import evaluation_loader
from emcl.data.samples import Sample
from emcl.data.shards import open_shards
from emcl.prepare.sample import generate
from emcl.prepare.writer import write_shard
from timing import Row, alternate, compared, script

FRAMES, WORKERS = 12, 2
REAL = Path(os.environ.get("EMCL_VIDEOS", "../shared/data/videos"))
"""A folder of real clips; without it those rows are left out."""
LONG = 60.0
"""Seconds of a long clip, made by repeating a short one."""


class FieldClips(Dataset[Any]):
    """As CLIP4Clip and its descendants read videos."""

    def __init__(self, files: list[Path], size: int) -> None:
        from torchvision import transforms

        self.files = files
        self.transform = transforms.Compose(
            [
                transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
                transforms.CenterCrop(size),
                transforms.ToTensor(),
                transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
            ]
        )

    def __getitem__(self, index: int) -> torch.Tensor:
        import cv2
        from PIL import Image

        video = cv2.VideoCapture(str(self.files[index]))
        total = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        frames = []
        for number in np.linspace(0, total - 1, FRAMES).astype(int):
            video.set(cv2.CAP_PROP_POS_FRAMES, int(number))
            there, frame = video.read()
            if there:
                frames.append(self.transform(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))))
        frames += [frames[-1]] * (FRAMES - len(frames))
        return torch.stack(frames)

    def __len__(self) -> int:
        return len(self.files)


def bare(file: str) -> int:
    """Decodes up to the last frame that is wanted, and keeps nothing."""
    with av.open(file) as container:
        stream = container.streams.video[0]
        stream.thread_type = "SLICE"
        count = 0
        last = stream.frames * (FRAMES - 0.5) / FRAMES if stream.frames else float("inf")
        for _ in container.decode(stream):
            count += 1
            if count > last:
                break
    return count


def folder_of(files: list[Path], folder: Path) -> Path:
    """The files as a shard beside them."""
    samples = ((Sample(id=path.stem, captions=["x"]), path.suffix.lstrip("."), path.read_bytes()) for path in files)
    write_shard(folder / "clips.tar", samples)
    return folder / "clips.tar"


def repeated(file: Path, seconds: float, out: Path) -> Path:
    """A clip again and again, encoded anew with a key frame every two seconds at the least."""
    with av.open(str(out), "w") as made:
        target: Any = None
        written = 0
        rate = 25
        while written < seconds * rate:
            with av.open(str(file)) as source:
                for frame in source.decode(video=0):
                    if target is None:
                        target = made.add_stream("libx264", rate=rate, options={"crf": "23", "g": "50"})
                        target.width, target.height = frame.width // 2 * 2, frame.height // 2 * 2
                        target.pix_fmt = "yuv420p"
                    plain = frame.reformat(target.width, target.height, "yuv420p")
                    plain.pts, plain.pict_type = written, av.video.frame.PictureType.NONE
                    plain.time_base = Fraction(1, rate)
                    made.mux(target.encode(plain))
                    written += 1
                    if written >= seconds * rate:
                        break
        made.mux(target.encode())
    return out


def timed(work: Callable[[], int]) -> float:
    began = time.perf_counter()
    clips = work()
    return clips * FRAMES / (time.perf_counter() - began)


def compare(
    case: str, files: list[Path], size: int, folder: Path, repeats: int, *, times: int, batch: int
) -> list[Row]:
    """All files so many times, so that starting processes is a small part."""
    shards = open_shards(str(folder_of(files, folder)))
    exact = DataConfig(frames=FRAMES, size=size, workers=WORKERS)

    def load(data: DataConfig) -> int:
        rows = list(range(len(shards))) * times
        loader = evaluation_loader(shards, data, {}, batch_size=batch, rank=0, world_size=1, rows=rows)
        return sum(len(batch["ids"]) for batch in loader)

    def ours() -> int:
        return load(exact)

    def key_frames() -> int:
        return load(replace(exact, keyframes=True))

    def field() -> int:
        return sum(
            len(clips) for clips in DataLoader(FieldClips(files * times, size), batch_size=batch, num_workers=WORKERS)
        )

    def floor() -> int:
        with ProcessPoolExecutor(WORKERS, get_context("fork")) as pool:
            return len(list(pool.map(bare, map(str, files * times))))

    work = {"ours": ours, "ours, key frames": key_frames, "bare PyAV": floor, "the field's": field}
    if times * len(files) > 100:  # short clips of one key frame or two
        del work["ours, key frames"]
    ours()  # files into the page cache, libraries into memory
    found = alternate({name: partial(timed, side) for name, side in work.items()}, repeats)
    targets = {"bare PyAV": ">= 0.95", "the field's": ">= 4"}
    fast = found.pop("ours, key frames", None)
    rows = [compared("loading", case, "frames/s", found, targets=targets)]
    if fast is not None:
        beside = {"ours": fast, "the field's": found["the field's"]}
        rows.append(compared("loading", f"{case}, data.keyframes", "frames/s", beside, targets=targets))
    return rows


def measure(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        generate(root / "sample", counts={"train": 240, "val": 0, "test": 0}, seed=0, progress=False)
        shards = open_shards(f"{root}/sample/train-*.tar")
        (root / "files").mkdir()
        files = []
        for row in shards.rows:
            files.append(root / "files" / f"{row.sample.id}.mp4")
            files[-1].write_bytes(shards.read(row))
        rows += compare("sample clips", files, 112, root, repeats, times=8, batch=64)
        real = sorted([*REAL.glob("*.mp4"), *REAL.glob("*.avi")]) if REAL.is_dir() else []
        if real:
            rows += compare("real clips", real, 224, root, repeats, times=2, batch=4)
        source = real[0] if real else files[0]
        long = [repeated(source, LONG, root / "long.mp4")] * 4
        copies = []
        for number, path in enumerate(long):
            copies.append(root / f"long{number}.mp4")
            copies[-1].write_bytes(path.read_bytes())
        rows += compare("long clips, 60 s", copies, 224, root, repeats, times=4, batch=4)
    return rows


if __name__ == "__main__":
    script(__doc__, measure, "loading")
