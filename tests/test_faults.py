"""Faults of data, loaders and ranks: counted, named, mended where the order of samples allows it."""

from __future__ import annotations

import io
import json
import os
import signal
import struct
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import av
import psutil
import pytest

from conftest import LAUNCH, ROOT, deepspeed_command, ends, launch, launch_environment, mlflow_run, recorded, small
from emcl.data.data_settings import DataConfig
from emcl.data.decode import DecodeError, decode
from emcl.data.mixture import open_training
from emcl.data.shards import open_shards
from emcl.errors import UserError
from emcl.prepare.writer import encode_mp4
from forked import start_ranks

DATA = DataConfig(frames=4, image_size=32, batch_size=6, workers=2)
Change = Callable[[str, bytes], "bytes | None"]
BLOCKING = ROOT / "tests" / "blocking.py"


def rewritten(source: Path, out: Path, change: Change) -> Path:
    """A copy of a shard with each member's content as `change` gives it; None leaves it out."""
    with tarfile.open(source) as old, tarfile.open(out, "w") as new:
        for member in old:
            content = change(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
            if content is not None:
                info = tarfile.TarInfo(member.name)
                info.size = len(content)
                new.addfile(info, io.BytesIO(content))
    return out


def keys(shard: Path) -> list[str]:
    with tarfile.open(shard) as tar:
        return list(dict.fromkeys(name.partition(".")[0] for name in tar.getnames()))


@pytest.mark.parametrize(
    ("ending", "damage", "named"),
    [
        ("json", lambda _: b'{"id": ', "not a sample's JSON"),
        ("json", lambda _: None, "has no JSON"),
        ("mp4", lambda _: None, "has no video"),
    ],
)
def test_damaged_samples_are_left_out_named_and_counted_up_to_a_fraction(
    ending: str, damage: Callable[[bytes], bytes | None], named: str, sample_shards: Path, tmp_path: Path
) -> None:
    first = sample_shards / "train-000000.tar"
    bad = f"{keys(first)[3]}.{ending}"
    rewritten(first, tmp_path / "a.tar", lambda name, content: damage(content) if name == bad else content)
    shards, _ = open_training(replace(DATA, train=str(tmp_path), max_bad_fraction=0.1), seed=0)
    assert len(shards) == 11
    assert len(shards.damaged) == 1 and named in shards.damaged[0]
    with pytest.raises(UserError, match=f"1 of 12 samples are lost.*max_bad_fraction=0.001.*{named}"):
        open_training(replace(DATA, train=str(tmp_path)), seed=0)
    with pytest.raises(UserError, match=named):  # a score must be that of the whole split
        open_shards(str(tmp_path))


@pytest.mark.parametrize("kept", [0.0, 0.4, 0.9])
def test_what_a_torn_shard_still_holds_is_used_where_so_much_may_be_lost(
    kept: float, sample_shards: Path, tmp_path: Path
) -> None:
    whole = (sample_shards / "train-000000.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: int(kept * len(whole))])
    (tmp_path / "b.tar").write_bytes((sample_shards / "train-000001.tar").read_bytes())
    (tmp_path / "index.json").write_text(json.dumps({"shards": {"a.tar": {"samples": 12}}}))
    shards, _ = open_training(replace(DATA, train=str(tmp_path), max_bad_fraction=0.6), seed=0)
    assert 12 <= len(shards) < 24
    assert "a.tar" in shards.damaged[0]
    lost = 24 - len(shards)
    with pytest.raises(UserError, match=rf"{lost} of 24 samples are lost.*a\.tar"):
        open_training(replace(DATA, train=str(tmp_path), max_bad_fraction=0.01), seed=0)


def test_bad_clips_are_replaced_alike_on_all_ranks_counted_and_too_many_end_the_run(
    sample_shards: Path, tmp_path: Path
) -> None:
    first = sample_shards / "train-000000.tar"
    zero, cut = (f"{key}.mp4" for key in keys(first)[2:4])
    change: Change = lambda name, content: b"" if name == zero else content[:99] if name == cut else content  # noqa: E731
    (tmp_path / "shards").mkdir()
    rewritten(first, tmp_path / "shards" / "train-000000.tar", change)
    for other in ("train-000001", "val-000000", "test-000000"):
        (tmp_path / "shards" / f"{other}.tar").symlink_to(sample_shards / f"{other}.tar")
    settings = [*small(tmp_path / "shards"), "data.val=null", "data.test=null", "name=run"]
    lenient = ["data.max_bad_fraction=0.1", *recorded(tmp_path)]
    fine = launch("--task", "retrieval", *settings, *lenient, cwd=tmp_path, ranks=2)
    assert fine.returncode == 0, fine.stdout + fine.stderr
    named = (tmp_path / "runs/run/bad_clips.txt").read_text().splitlines()
    assert len(named) == 2 and all("train-000000.tar" in line for line in named)
    assert mlflow_run(tmp_path)[1].data.metrics["bad_clips"] == 2  # though seen in each of two epochs
    strict = launch("--task", "retrieval", *settings, "name=strict", cwd=tmp_path, ranks=2)
    assert strict.returncode != 0
    assert "max_bad_fraction=0.001" in strict.stderr and "Traceback" not in strict.stderr


def test_a_clip_of_one_frame_is_shown_in_every_slot() -> None:
    import numpy as np

    video = encode_mp4(np.full((1, 32, 32, 3), 90, np.uint8), 25)
    frames = decode(video, frames=5, size=32)
    assert len(frames) == 5 and (frames == frames[0]).all()


def test_a_duration_that_cannot_be_is_an_error_of_the_clip(sample_shards: Path) -> None:
    shards = open_shards(f"{sample_shards}/train-000000.tar")
    whole = shards.read(shards.rows[0])
    none = bytearray(whole)
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        at = none.index(box) + offset
        none[at : at + 4] = bytes(4)
    with pytest.raises(DecodeError, match="no duration"):
        decode(bytes(none), frames=4, size=32)
    with pytest.raises(DecodeError, match="says that it lasts"):
        decode(as_mkv_of(10_000_000_000.0, whole), frames=4, size=32)


def as_mkv_of(milliseconds: float, video: bytes) -> bytes:
    """The frames in a Matroska file that says it lasts so long (EBML element 0x4489)."""
    out = io.BytesIO()
    with av.open(io.BytesIO(video)) as source, av.open(out, "w", format="matroska") as made:
        stream = made.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                made.mux(packet)
    content = bytearray(out.getvalue())
    at = content.index(b"\x44\x89\x88") + 3
    content[at : at + 8] = struct.pack(">d", milliseconds)
    return bytes(content)


CASES = {
    "more ranks than a batch has samples": (["data.batch_size=1"], "data.batch_size=1 is not divisible by 2 ranks"),
    "no sample fills a batch": (["data.batch_size=4096"], "24 training samples do not fill one global batch of 4096"),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_without_samples_are_an_error_before_they_meet(case: str, sample_shards: Path, tmp_path: Path) -> None:
    settings, named = CASES[case]
    done = launch("--task", "retrieval", *small(sample_shards), *settings, cwd=tmp_path, ranks=2)
    assert done.returncode != 0 and named in done.stderr
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", ["retrieval", "captioning", "msrvtt_qa"])
def test_a_task_whose_samples_are_all_filtered_out_is_named_before_there_is_a_group(
    task: str, sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from emcl import distributed
    from emcl.train.run import run

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(distributed, "start", lambda: pytest.fail("the ranks have met"))
    bare: Change = lambda name, content: b'{"id": "a"}' if name.endswith("json") else content  # noqa: E731
    rewritten(sample_shards / "train-000000.tar", tmp_path / "bare.tar", bare)
    with pytest.raises(UserError, match=f"{task}: none of the 12 training samples has a"):
        run([task], overrides=[*small(sample_shards), f"data.train={tmp_path}/bare.tar"])


def test_fewer_shards_than_ranks_and_workers_are_enough(sample_shards: Path, tmp_path: Path) -> None:
    settings = [*small(sample_shards), f"data.train={sample_shards}/train-000000.tar", "data.workers=2"]
    done = launch("--task", "retrieval", *settings, "data.batch_size=6", "name=run", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr


LONG = [
    "optim.epochs=100000", "evaluate.every_epochs=100000", "name=run", "tracking.every_steps=1", "data.test=null",
    "patience=5",
]  # fmt: skip
BY_PLATFORM = {"PYTHONPATH": str(ROOT / "platform")}


def some_steps_in(log: Path) -> None:
    until = time.monotonic() + 120
    while "samples/s" not in log.read_text():
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.1)


def with_children(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    return [one for process in processes for one in (process, *process.children(recursive=True))]


def kill_all(processes: Iterable[psutil.Process]) -> None:
    for one in processes:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def error_in(log: Path) -> str:
    output = log.read_text()
    assert "Traceback" not in output
    return next((line for line in output.splitlines() if line.startswith("error: ")), output)


@pytest.mark.parametrize(
    ("script", "fault", "rank"),
    [
        pytest.param(LAUNCH, signal.SIGKILL, 1, id="gloo tells the others of a death"),
        pytest.param(BLOCKING, signal.SIGKILL, 0, id="rank 0 dies, and collectives block"),
        pytest.param(BLOCKING, signal.SIGKILL, 1, id="rank 1 dies, and collectives block"),
        pytest.param(BLOCKING, signal.SIGSTOP, 0, id="rank 0 hangs, and collectives block"),
        pytest.param(BLOCKING, signal.SIGSTOP, 1, id="rank 1 hangs, and collectives block"),
    ],
)
def test_a_rank_that_dies_or_hangs_is_named_and_the_other_ends(
    script: Path, fault: signal.Signals, rank: int, sample_shards: Path, tmp_path: Path
) -> None:
    """By themselves: there is no launcher that would end them."""
    log = tmp_path / "log"
    log.touch()
    arguments = ["--task", "retrieval", *small(sample_shards), *LONG]
    environment = launch_environment(BY_PLATFORM)
    ranks = start_ranks(script, arguments, 2, env=environment, cwd=tmp_path, stdout=log)
    everyone: list[psutil.Process] = []
    try:
        some_steps_in(log)
        of_each = [with_children([psutil.Process(one.pid)]) for one in ranks]
        everyone = [*of_each[0], *of_each[1]]
        began = time.monotonic()
        os.kill(ranks[rank].pid, fault)
        assert ranks[1 - rank].wait(timeout=100) not in (0, -signal.SIGKILL)
        assert f"rank {rank}" in error_in(log)
        assert time.monotonic() - began < 100
        assert all(ends(one) for one in of_each[1 - rank]), "a process is left"
        if fault == signal.SIGKILL:
            assert all(ends(one) for one in of_each[rank]), "a loader of the dead rank is left"
    finally:
        kill_all([*everyone, *with_children(psutil.Process(one.pid) for one in ranks if one.poll() is None)])


@pytest.mark.slow
def test_the_launcher_ends_a_rank_that_hangs(sample_shards: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ["--task", "retrieval", *small(sample_shards), *LONG]
    command, environment = deepspeed_command(*arguments, ranks=2, script=BLOCKING, env=BY_PLATFORM)
    with log.open("w") as out:
        running = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
    everyone: list[psutil.Process] = []
    try:
        some_steps_in(log)
        everyone = with_children([psutil.Process(running.pid)])
        next(one for one in everyone if "--local_rank=1" in one.cmdline()).suspend()  # its loaders come after it
        assert running.wait(timeout=120) != 0
        assert "rank 1" in error_in(log)
        assert all(ends(one) for one in everyone), "a process is left"
    finally:
        kill_all(everyone or with_children([psutil.Process(running.pid)]))
        running.wait()
