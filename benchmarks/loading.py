"""Frames per second of the whole loader, compared with decoding alone and with a commonly used loader.

Ours: read the tar, decode 12 frames per clip, resize, crop, collate, send; two workers. `bare PyAV` is the floor: as
many processes decode up to the last of the same frames, and do nothing else. `the field's` is the common approach: a
Dataset of single files, read with OpenCV by seeking to each frame, PIL and torchvision transforms, normalised float32,
PyTorch's DataLoader, two workers.

Tars have the original files, except in `as emcl prepare stores them` (short side 256, 3 frames per second): the same
videos after that command, compared with the common loader on the original files and on the prepared ones.

The last rows are the throughput of a loader process by storage format and augmentation (`feeding.py`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import feeding
from emcl.data.data_settings import DataConfig
from emcl.data.loader import evaluation_loader
from emcl.data.samples import Sample
from emcl.data.shards import ShardSet, open_shards
from emcl.data.split import Split
from emcl.prepare.clips import Clip
from emcl.prepare.sharding import Options, prepare_shards
from emcl.prepare.videos import Videos
from emcl.prepare.writer import write_shard
from sample_clips import sample_clips
from timing import Row, alternate, compared, script

FRAMES, WORKERS = 12, 2
REAL = Path(os.environ.get("EMCL_VIDEOS", "../shared/data/videos"))
"""A folder of real clips; without it their rows are skipped."""
LONG = 60.0
"""Seconds of a long clip, made by repeating a short one."""
FIELD, FIELD_AFTER = "the field's", "the field's on these too"
KEY_FRAMES, PREPARED = "data.keyframes", "as emcl prepare stores them"


class FieldClips(Dataset[Any]):
    """Reads videos like CLIP4Clip and code derived from it."""

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
            decoded, frame = video.read()
            if decoded:
                frames.append(self.transform(Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))))
        frames += [frames[-1]] * (FRAMES - len(frames))
        return torch.stack(frames)

    def __len__(self) -> int:
        return len(self.files)


def bare(file: str) -> int:
    """Decodes up to the last wanted frame and discards everything."""
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


def kept(files: list[Path], folder: Path) -> ShardSet:
    """Writes the unchanged files to a shard in `folder`."""
    samples = ((Sample(id=path.stem, captions=["x"]), path.suffix.lstrip("."), path.read_bytes()) for path in files)
    write_shard(folder / "clips.tar", samples)
    return open_shards(str(folder / "clips.tar"))


def prepared(files: list[Path], folder: Path) -> ShardSet:
    """Runs `emcl prepare folder` on the files, with output in `folder`."""
    clips = [Clip(id=path.stem, file=path.name, split="train", captions=["x"]) for path in files]
    prepare_shards(clips, Videos(files[0].parent), folder, Options(progress=False), source="bench")
    return open_shards(f"{folder}/train-*.tar")


def unpacked(shards: ShardSet, folder: Path) -> list[Path]:
    """Writes each sample's video to a file."""
    folder.mkdir(parents=True)
    files = [folder / f"{row.sample.id}.mp4" for row in shards.rows]
    for path, row in zip(files, shards.rows, strict=True):
        path.write_bytes(shards.read(row))
    return files


def repeated(file: Path, seconds: float, out: Path) -> Path:
    """Repeats a clip and re-encodes it, with a key frame at least every two seconds."""
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


@dataclass(frozen=True)
class Case:
    """Videos that all sides read, and how often: enough that start-up is a small share and workers are balanced."""

    name: str
    files: list[Path]
    size: int
    times: int
    batch: int
    field_times: int
    """Repetitions for the field's loader, which is the slowest."""

    def ours(self, shards: ShardSet, *, keyframes: bool = False) -> int:
        data = DataConfig(frames=FRAMES, image_size=self.size, workers=WORKERS, keyframes=keyframes)
        rows = list(range(len(shards))) * self.times
        loader = evaluation_loader(Split(shards), data, {}, batch_size=self.batch, rank=0, world_size=1, rows=rows)
        return sum(len(batch.ids) for batch in loader)

    def field(self, files: list[Path] | None = None) -> int:
        clips = FieldClips((files or self.files) * self.field_times, self.size)
        return sum(len(batch) for batch in DataLoader(clips, batch_size=self.batch, num_workers=WORKERS))

    def floor(self) -> int:
        with ProcessPoolExecutor(WORKERS, get_context("fork")) as pool:
            return len(list(pool.map(bare, map(str, self.files * self.times))))


def rows_of(case: Case, folder: Path, repeats: int, *, others: tuple[str, ...] = ()) -> list[Row]:
    """Rows for the unchanged files; with `others`, also with KEY_FRAMES and after `emcl prepare` (PREPARED)."""
    whole = kept(case.files, folder / "kept")
    work: dict[str, Callable[[], int]] = {
        "ours": partial(case.ours, whole),
        "bare PyAV": case.floor,
        FIELD: case.field,
    }
    if KEY_FRAMES in others:
        work[KEY_FRAMES] = partial(case.ours, whole, keyframes=True)
    if PREPARED in others:
        made = prepared(case.files, folder / "prepared")
        work[PREPARED] = partial(case.ours, made)
        work[FIELD_AFTER] = partial(case.field, unpacked(made, folder / "files"))
    case.ours(whole)  # warm-up: page cache and libraries
    rates = alternate({name: partial(timed, side) for name, side in work.items()}, repeats)
    sides = {"bare PyAV": rates["bare PyAV"], FIELD: rates[FIELD]}
    rows = [_row(case.name, rates["ours"], sides)]
    for other in others:
        beside = {name: rates[name] for name in (FIELD, *([FIELD_AFTER] if other == PREPARED else []))}
        rows.append(_row(f"{case.name}, {other}", rates[other], beside))
    return rows


def _row(name: str, ours: list[float], others: dict[str, list[float]]) -> Row:
    targets = {"bare PyAV": ">= 0.95", FIELD: ">= 4"}
    return compared("loading", name, "frames/s", {"ours": ours, **others}, targets=targets)


def measure(repeats: int) -> list[Row]:
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, sample_clips() as clips:
        root = Path(name)
        sample = unpacked(open_shards(clips), root / "files")
        real = sorted([*REAL.glob("*.mp4"), *REAL.glob("*.avi")]) if REAL.is_dir() else []
        (root / "long").mkdir()
        first = repeated(real[0] if real else sample[0], LONG, root / "long" / "0.mp4")
        long = [first, *(Path(shutil.copy(first, root / "long" / f"{number}.mp4")) for number in (1, 2, 3))]
        case = Case("sample clips", sample, size=112, times=4, batch=64, field_times=1)
        rows += rows_of(case, root / "sample", repeats)
        if real:
            case = Case("real clips", real, size=224, times=2, batch=4, field_times=2)
            rows += rows_of(case, root / "real", repeats, others=(PREPARED,))
        case = Case("long clips, 60 s", long, size=224, times=4, batch=4, field_times=4)
        rows += rows_of(case, root / "repeated", repeats, others=(KEY_FRAMES, PREPARED))
        if real:
            rows += feeding.rows(real, root / "feeding", repeats)
    return rows


if __name__ == "__main__":
    script(__doc__, measure, "loading")
