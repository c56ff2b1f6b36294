"""The data sets of the ablation, and how their shards and frozen towers are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file

from emcl.config import DEFAULT_RECIPE
from emcl.errors import UserError
from emcl.run_folder import RUNS, WEIGHTS, RunFolder

MSRVTT = "shards/msrvtt_frames"
EVERY_SENTENCE = "shards/msrvtt_frames_every_sentence"
SAMPLE_TOWERS = Path("weights/sample-towers.safetensors")


@dataclass(frozen=True)
class DataSet:
    """Shards to train on, to sweep on and to report on."""

    name: str
    title: str
    recipe: str
    settings: tuple[str, ...]
    bases: int
    """K of the joint compact layer: two thirds of the width."""
    train: str
    test: str
    """Test shards with all sentences."""
    test_pairs: str | None
    """The same videos, each with the benchmark's one sentence; None means that the first sentence is used."""
    sweep_train: str
    val: str
    """Videos that are in neither `sweep_train` nor the test set."""
    make: Callable[[Path | None, Path | None], None]
    """Makes missing shards and towers."""


def make_msrvtt(annotations: Path | None, frames: Path | None) -> None:
    """Raises UserError if shards are missing and their source files are not given."""
    from emcl.prepare.benchmarks import read_benchmark
    from emcl.prepare.pretrained_towers import write_towers
    from emcl.prepare.sharding import Encoding, Options, prepare_shards
    from emcl.prepare.videos import Videos

    if not Path("weights/towers").is_dir():
        write_towers(Path("weights/towers"))
    for folder, protocol in ((MSRVTT, "1k-A"), (EVERY_SENTENCE, "1k-A-all")):
        if any(Path(folder).glob("test-*.tar")):
            continue
        if annotations is None or frames is None:
            raise UserError(
                f"{folder} is not there: make ablation MSRVTT=FOLDER FRAMES=TAR (docs/emcl.md), or --sets sample"
            )
        clips, _ = read_benchmark("msrvtt", protocol, annotations)
        if protocol == "1k-A-all":  # its training videos are in the other folder
            clips = [clip for clip in clips if clip.split == "test"]
        options = Options(encoding=Encoding(keep=True), allow_missing=True)
        prepare_shards(clips, Videos(frames), Path(folder), options, source="msrvtt", protocol=protocol)


def train_to_the_end(folder: RunFolder, recipe: str, settings: Sequence[str]) -> None:
    """Trains a retrieval run, or resumes it if it was interrupted."""
    from emcl.train.run import run

    if folder.whole_checkpoints():
        run(["retrieval"], overrides=settings, resume=str(folder))
    else:
        run(["retrieval"], recipe=recipe, overrides=[*settings, f"runs={folder.path.parent}", f"name={folder.name}"])


def make_sample(_: Path | None, __: Path | None) -> None:
    """Trains the sample recipe for 5 epochs without EMCL; every variant uses its towers, frozen."""
    if SAMPLE_TOWERS.is_file():
        return
    folder = RunFolder(Path(RUNS) / "ablation-towers")
    if not (folder.best / WEIGHTS).is_file():
        settings = [
            "emcl.enabled=false",
            "emcl.factors=0",
            "optim.epochs=5",
            "data.val=null",
            "data.test=null",
            "tracking.enabled=false",
        ]
        train_to_the_end(folder, DEFAULT_RECIPE, settings)
    trained = load_file(folder.best / WEIGHTS)
    towers = {}
    for name, value in trained.items():
        for ours, theirs in (("backbone.image.trunk.", "visual."), ("backbone.text.trunk.", "text.")):
            if name.startswith(ours):
                towers[theirs + name.removeprefix(ours)] = value
    towers["logit_scale"] = trained["tasks.retrieval.logit_scale"].squeeze()
    SAMPLE_TOWERS.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in towers.items()}, SAMPLE_TOWERS)


SETS = {
    "sample": DataSet(
        name="sample",
        title="sample set, frozen towers of a run without EMCL",
        recipe="sample",
        settings=(
            f"model.pretrained={SAMPLE_TOWERS}", "model.frozen=[image,text]", "model.cache_features=true",
            "data.cache_gib=0", "data.workers=0", "optim.epochs=6",
        ),
        bases=128,
        train="shards/sample/train-{000000..000003}.tar",
        test="shards/sample/test-000000.tar",
        test_pairs=None,
        sweep_train="shards/sample/train-{000000..000003}.tar",
        val="shards/sample/val-000000.tar",
        make=make_sample,
    ),
    "msrvtt_frames": DataSet(
        name="msrvtt_frames",
        title="MSR-VTT, 476 of 1,000 test videos, key frames",
        recipe="msrvtt_frames",
        settings=(
            "model.temporal=mean", "optim.epochs=1", "data.workers=0",
            # as before the recipe had these
            "emcl.enabled=true", "model.head_dropout=0", "tasks.retrieval.pooling_temperature=3",
        ),
        bases=256,
        train=f"{MSRVTT}/train-{{000000..000008}}.tar",
        test=f"{EVERY_SENTENCE}/test-000000.tar",
        test_pairs=f"{MSRVTT}/test-000000.tar",
        sweep_train=f"{MSRVTT}/train-{{000000..000006}}.tar",
        val=f"{MSRVTT}/train-{{000007..000008}}.tar",
        make=make_msrvtt,
    ),
}  # fmt: skip
