"""One run from settings to the final table; what launch.py and a notebook call."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from emcl import distributed
from emcl.config import Config, to_yaml
from emcl.data.at_hand import missing, of_sample, wanted
from emcl.data.order import check_divisible
from emcl.data.shards import find_shards, open_shards
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.evaluate.driver import evaluate, split_name
from emcl.evaluate.report import record, table
from emcl.model.limits import check_limits
from emcl.model.towers import missing_weights
from emcl.prepare.sample import generate
from emcl.registry import expand, task_class
from emcl.task import Scores
from emcl.tracking import Tracker, open_tracker
from emcl.train.arithmetic import set_arithmetic
from emcl.train.cores import place, too_few_cores
from emcl.train.engine import deepspeed_settings
from emcl.train.export import open_export
from emcl.train.features import open_source
from emcl.train.folders import config_of_run, find_export, find_run
from emcl.train.inputs import Inputs, open_inputs
from emcl.train.lock import RunLock
from emcl.train.loop import Trainer, write_run
from emcl.train.stop import Stopped
from emcl.train.watch import Watch


def run(
    tasks: Sequence[str] | None,
    *,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    evaluate_path: Path | None = None,
    resume: str | None = None,
    init: Path | None = None,
) -> dict[str, Scores]:
    """Trains (or only evaluates) and returns the test scores of each task; without `tasks`, of those of the recipe.

    With `init`, training starts from the weights of an earlier run, of the same tasks or of others.

    Everything that can be wrong with the settings is found before a process group or a folder is made.

    Raises:
        UserError: one line for the user.
    """
    for name in expand(tasks or []):
        task_class(name)
    init = find_export(init) if init else None
    folder = find_run(resume) if resume else None
    config = config_of_run(tasks, recipe, overrides, evaluate=evaluate_path, resumed=folder)
    expected = distributed.described()
    _check(config, expected, training=evaluate_path is None)
    inputs = open_inputs(config, expected, init) if evaluate_path is None else None
    set_arithmetic(config)
    distributed.quiet_start()
    ranks = distributed.start()
    device = distributed.device()
    name = folder.name if folder else ranks.from_first(config.name or _name(list(config.tasks)))
    with _Recorded() as recorded, Watch(ranks, config.patience, at_end=recorded.failed) as watch:
        if inputs is None:
            assert evaluate_path is not None
            export = find_export(evaluate_path)
            recorded.tracker = open_tracker(config, f"evaluate {export.parent.name}", first_rank=ranks.first)
            return _score(export, config, ranks, device, _home(export), recorded.tracker, watch, step=0)
        folder = folder or Path(config.runs) / name
        return _train(inputs, ranks, device, folder, recorded, watch, resuming=resume is not None, init=init)


def _train(
    inputs: Inputs,
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    recorded: _Recorded,
    watch: Watch,
    *,
    resuming: bool,
    init: Path | None,
) -> dict[str, Scores]:
    few = too_few_cores(ranks.gather_objects(place()), inputs.config.data.workers)
    if few and ranks.first:
        print(f"note: {few}", flush=True)
    lock = _locked(folder, ranks) if resuming else None
    # before anything is recorded: it finds what is wrong
    trainer = Trainer(inputs, ranks, device, folder, init=init, resuming=resuming, watch=watch)
    if not resuming:
        lock = _locked(folder, ranks)
    config = inputs.config
    continued = _mlflow_run(folder) if resuming else None
    tracker = open_tracker(config, folder.name, first_rank=ranks.first, continued=continued, folder=folder)
    recorded.tracker = tracker
    if ranks.first:
        facts = {"tracking": tracker.uri, "mlflow_run": tracker.run_id, "ranks": ranks.world_size}
        write_run(folder, to_yaml(config), facts)
        tracker.text(to_yaml(config), "config.yaml")
        print(
            f"{folder.name}: {', '.join(config.tasks)} on {ranks.world_size} {device.type} process(es), "
            f"{trainer.parameters / 1e6:.1f} M parameters, {len(trainer.shards)} videos, {trainer.total} steps of "
            f"{config.data.batch_size}, {Path(config.deepspeed).stem}, {config.precision}",
            flush=True,
        )
        if trainer.taken:
            print(trainer.taken, flush=True)
    trainer.train(tracker)
    total = trainer.total
    del trainer
    scores = {}
    if config.data.test:
        scores = _score(folder / "best", config, ranks, device, folder, tracker, watch, step=total)
    if ranks.first:
        print(f"\nfiles of this run: {folder}/ (best/ is the exported model: emcl.load('{folder}/best'))")
        if tracker.uri:
            hint = f"mlflow ui --backend-store-uri {tracker.uri}" if tracker.uri.startswith("sqlite") else tracker.uri
            print(f"compare runs in MLflow: {hint}")
    del lock  # held until the test is scored
    return scores


def _score(
    export: Path,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    folder: Path,
    tracker: Tracker,
    watch: Watch,
    *,
    step: int,
) -> dict[str, Scores]:
    """The exported model on the test split."""
    watch.slow("scoring the test split")
    model, _ = open_export(export, config)
    model.to(device)
    shards = open_shards(str(config.data.test))
    source = open_source(config, shards, model.backbone, ranks, device, progress=watch.progress)
    scores = evaluate(model, source, config, ranks, device, name="test", progress=watch.progress)
    if ranks.first:
        split = split_name("test", config)
        record(scores, shards, config, folder, tracker, split=split, step=step)
        for name, item in scores.items():
            print(f"\n{name} on {split}\n{table(item)}", flush=True)
    return scores


def _check(config: Config, ranks: Ranks, *, training: bool) -> None:
    """What else would fail later: batch size, shards, weights, the DeepSpeed file. Renders the sample set if asked."""
    check_limits(config)
    patterns = wanted(config.data, training=training)
    if training:
        check_divisible(config.data.batch_size, ranks.world_size, config.optim.accumulation)
        deepspeed_settings(config, ranks.world_size)
        for error in missing_weights(config.model):
            raise UserError(error)
    if ranks.first and ((training and config.data.val) or config.data.test):
        for notice in [line for name in config.tasks for line in task_class(name).notices()]:
            print(f"note: {notice}", flush=True)
    made = of_sample(config.data, patterns)
    for pattern in patterns:
        if pattern not in made:  # an error comes before minutes of rendering
            find_shards(pattern)
    if missing(made):
        _render(Path(config.data.train).parent, made)


def _render(folder: Path, patterns: list[str]) -> None:
    """The sample set, by whichever process of this disk comes first; the others wait for it.

    Raises:
        UserError: its shards are not those of `patterns`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if missing(patterns):
            generate(folder, seed=0)
    for pattern in patterns:
        find_shards(pattern)


def _name(tasks: Sequence[str]) -> str:
    return f"{'-'.join(tasks)}-{time.strftime('%Y%m%d-%H%M%S')}"


def _home(export: Path) -> Path:
    return export.parent if export.name == "best" else export


def _locked(folder: Path, ranks: Ranks) -> RunLock | None:
    """Rank 0's hold on the folder; an error of it is one of all ranks."""
    lock, error = None, None
    if ranks.first:
        try:
            lock = RunLock(folder)
        except UserError as found:
            error = found
    ranks.agree(error)
    return lock


def _mlflow_run(folder: Path) -> str | None:
    """The MLflow run that a folder's run was recorded as."""
    try:
        return json.loads((folder / "run.json").read_text()).get("mlflow_run")
    except (OSError, ValueError):
        return None


class _Recorded:
    """Ends the tracked run, once there is one, with the status that its block ends with."""

    tracker: Tracker | None = None

    def __enter__(self) -> _Recorded:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind in (KeyboardInterrupt, Stopped)
        self._finish("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def failed(self) -> None:
        self._finish("FAILED")

    def _finish(self, status: str) -> None:
        if self.tracker is not None:
            self.tracker.finish(status)
