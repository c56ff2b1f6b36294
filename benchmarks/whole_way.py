"""From published files to a report, with the user's commands: `make whole-way`.

    python benchmarks/whole_way.py msrvtt --annotations DIR --videos videos.tar    key-frame videos, 1k-A
    python benchmarks/whole_way.py clips --annotations DIR --videos DIR            a folder of whole clips

Prepares, verifies, trains, scores every inference option, reports. `clips` uses `annotations.json` in the video folder
(a table for `emcl prepare folder`) and, for files named `videoN.mp4`, MSR-VTT's sentences.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import time
from pathlib import Path

from emcl.prepare.benchmarks import read_benchmark
from emcl.run_folder import RunFolder

CLIPS = (
    "data.generate=false", "data.val=null", "data.batch_size=16", "data.frames=12", "optim.epochs=60", "optim.lr=1e-3",
    "optim.backbone_lr=1e-3", "checkpoint.every_steps=1000",
)  # fmt: skip
"""The few clips are overfitted: the result says nothing about other clips."""


def say_and_do(*command: str) -> None:
    print(f"\n$ {shlex.join(command)}", flush=True)
    began = time.perf_counter()
    subprocess.run(command, check=True)
    print(f"[{time.perf_counter() - began:.0f} s]", flush=True)


def train(run: RunFolder, *arguments: str) -> None:
    """Trains a run, or resumes an existing one."""
    new = ["--task", "retrieval", *arguments, f"runs={run.path.parent}", f"name={run.name}"]
    chosen = ["--resume", str(run)] if run.whole_checkpoints() else new
    say_and_do("deepspeed", "--num_accelerators", "1", "platform/launch.py", *chosen)


def msrvtt(options: argparse.Namespace) -> None:
    if not Path("weights/towers").is_dir():
        say_and_do("emcl", "towers")
    given = ["--annotations", str(options.annotations), "--videos", str(options.videos)]
    shards = f"{options.out}/shards"
    say_and_do("emcl", "prepare", "msrvtt", *given, "--keep", "--allow-missing", "--out", shards)
    say_and_do("emcl", "verify", shards)
    data = [f"data.train={shards}/train-*.tar", f"data.test={shards}/test-*.tar"]
    train(_run(options), "--recipe", "msrvtt_frames", *data, *options.set)


def clips(options: argparse.Namespace) -> None:
    """Trains and tests on the same clips: this shows the workflow, the scores mean nothing."""
    options.out.mkdir(parents=True, exist_ok=True)
    table = options.out / "clips.json"
    table.write_text(json.dumps(table_of_clips(options.videos, options.annotations), indent=1))
    shards = f"{options.out}/shards"
    say_and_do(
        "emcl", "prepare", "folder", "--videos", str(options.videos), "--annotations", str(table), "--out", shards,
    )  # fmt: skip
    say_and_do("emcl", "verify", "--decode", shards)
    data = [f"data.train={shards}/train-*.tar", f"data.test={shards}/train-*.tar"]
    train(_run(options), *data, *CLIPS, *options.set)


def table_of_clips(videos: Path, annotations: Path) -> list[dict[str, object]]:
    """The folder's own annotations, and MSR-VTT's sentences for the MSR-VTT videos in it."""
    rows: list[dict[str, object]] = json.loads((videos / "annotations.json").read_text())
    published, _ = read_benchmark("msrvtt", "official", annotations)
    present = {path.name for path in videos.iterdir()}
    rows += [
        {"id": clip.id, "file": f"{clip.id}.mp4", "captions": clip.captions}
        for clip in published
        if f"{clip.id}.mp4" in present
    ]
    return rows


def _run(options: argparse.Namespace) -> RunFolder:
    return RunFolder(options.out / "runs" / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("msrvtt", "clips"))
    parser.add_argument("--annotations", type=Path, required=True, help="folder of MSR-VTT's annotations")
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="folder for shards, run and report (default: whole-way/WHAT)")
    parser.add_argument("set", nargs="*", metavar="key=value", help="settings of the training")
    options = parser.parse_intermixed_args()
    options.out = options.out or Path("whole-way") / options.what
    {"msrvtt": msrvtt, "clips": clips}[options.what](options)
    run = str(_run(options))
    say_and_do("emcl", "options", run)
    say_and_do("emcl", "report", run, "--out", f"{options.out}/report")


if __name__ == "__main__":
    main()
