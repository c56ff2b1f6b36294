"""The benchmarks of `emcl prepare`: their readers, protocols, and expected numbers of videos and captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from emcl.errors import UserError
from emcl.prepare import activitynet, didemo, lsmdc, msrvtt, msvd, vatex
from emcl.prepare.clips import Clip
from emcl.suggestions import nearest

Counts = dict[str, tuple[int, int]]
"""Split -> number of videos, and of captions (or questions)."""


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark as published."""

    read: Callable[[Path, str], list[Clip]]
    protocols: dict[str, Counts]
    """Expected counts of each protocol; the first is the default. Empty if we know no published count."""
    files: str
    """Files that `--annotations` must have."""


OFFICIAL_JSON = "train_val_videodatainfo.json and test_videodatainfo.json (zipped or not), or MSRVTT_data.json"

DIDEMO_PARAGRAPHS: Counts = {"train": (8392, 8392), "val": (1065, 1065), "test": (1004, 1004)}

BENCHMARKS = {
    "msrvtt": Benchmark(
        read=msrvtt.read,
        protocols={
            "1k-A": {"train": (9000, 180_000), "test": (1000, 1000)},
            "1k-A-all": {"train": (9000, 180_000), "test": (1000, 20_000)},
            "7k": {"train": (7010, 140_200), "test": (1000, 1000)},
            "official": {"train": (6513, 130_260), "val": (497, 9_940), "test": (2990, 59_800)},
        },
        files=f"{OFFICIAL_JSON}; for 1k-A and 7k the lists MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv",
    ),
    "msrvtt-qa": Benchmark(
        read=msrvtt.read_qa,
        protocols={
            "official": {"train": (6513, 158_581), "val": (497, 12_278), "test": (2990, 72_821)},
            "by-video": {},
        },
        files="{train,val,test}.jsonl, .json or _qa.json",
    ),
    "msvd": Benchmark(
        read=msvd.read,
        protocols={"official": {"train": (1200, 48_774), "val": (100, 4_290), "test": (670, 27_763)}},
        files="{train,val,test}_list.txt and raw-captions.pkl or captions_msvd.json",
    ),
    "msvd-qa": Benchmark(
        read=msvd.read_qa,
        protocols={"official": {"train": (1161, 30_933), "val": (245, 6_415), "test": (504, 13_157)}},
        files="{train,val,test}_qa.json and youtube_mapping.txt",
    ),
    "lsmdc": Benchmark(
        read=lsmdc.read,
        protocols={"official": {"train": (101_079, 101_079), "val": (7408, 7408), "test": (1000, 1000)}},
        files=", ".join(lsmdc.FILES.values()),
    ),
    "activitynet": Benchmark(
        read=activitynet.read,
        protocols={
            "val_1": {"train": (10_009, 10_009), "test": (4917, 4917)},
            "val_2": {"train": (10_009, 10_009), "test": (4885, 4885)},
            "val_1-moments": {"train": (37_421, 37_421), "test": (17_505, 17_505)},
            "val_2-moments": {"train": (37_421, 37_421), "test": (17_031, 17_031)},
        },
        files="train.json, val_1.json, val_2.json",
    ),
    "didemo": Benchmark(
        read=didemo.read,
        protocols={
            "paragraph": DIDEMO_PARAGRAPHS,
            "paragraph-31s": DIDEMO_PARAGRAPHS,
            "moments": {"train": (33_005, 33_005), "val": (4180, 4180), "test": (4021, 4021)},
        },
        files="{train,val,test}_data.json, and the lists *_list.txt",
    ),
    "vatex": Benchmark(
        read=vatex.read,
        protocols={
            "official": {"train": (25_991, 259_910), "val": (3000, 30_000), "test": (6000, 60_000)},
            "lists": {"train": (25_991, 259_910), "val": (1500, 15_000), "test": (1500, 15_000)},
        },
        files="vatex_training_v1.0.json, vatex_validation_v1.0.json, vatex_public_test_english_v1.1.json",
    ),
}


def read_benchmark(name: str, protocol: str | None, annotations: Path) -> tuple[list[Clip], str]:
    """The clips of a benchmark, and the protocol's name.

    Raises:
        UserError: an unknown protocol, or a published file that is missing or has another format.
    """
    benchmark = BENCHMARKS[name]
    protocol = protocol or next(iter(benchmark.protocols))
    if protocol not in benchmark.protocols:
        known = list(benchmark.protocols)
        raise UserError(f"--split {protocol}: {name} has {', '.join(known)}{nearest(protocol, known)}")
    try:
        clips = benchmark.read(annotations, protocol)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{annotations}: not as {name} is published ({type(error).__name__}: {error}); it wants {benchmark.files}"
        ) from None
    if not clips:
        raise UserError(f"{annotations}: no clip in the files of {name}")
    return clips, protocol
