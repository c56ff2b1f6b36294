"""One run from settings to the final table; what the launcher and a notebook call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from emcl import distributed
from emcl.components import check_components
from emcl.config import Config, to_yaml
from emcl.data.sampler import check_divisible
from emcl.data.shard_checks import missing, of_sample, wanted
from emcl.data.shards import find_shards
from emcl.data.split import Split, open_split
from emcl.disk import in_turn
from emcl.distributed import Ranks
from emcl.em import SharedFactors
from emcl.errors import UserError
from emcl.evaluate.driver import evaluate, split_name
from emcl.evaluate.results import record, table
from emcl.metrics.rescoring import check_rescoring
from emcl.model.architecture_limits import check_limits
from emcl.model.backbone import backbone_class, tokenizer_of
from emcl.model.feature_cache import with_features
from emcl.model.pair_scores import described_factors, exact_device, weight_of
from emcl.multitask import VideoLanguageModel, check_tasks
from emcl.prepare.sample_set import generate
from emcl.run_folder import EVALUATIONS, FACTORS, INIT, TOWERS, RunFolder, export_identity
from emcl.task import Scores
from emcl.tracking import Tracker, open_tracker
from emcl.train import pair_factors
from emcl.train.arithmetic import set_arithmetic
from emcl.train.cores import host_and_cores, too_few_cores
from emcl.train.engine import deepspeed_settings
from emcl.train.export import open_export
from emcl.train.initialization import open_splits
from emcl.train.loop import Trainer
from emcl.train.preemption import Stopped
from emcl.train.run_config import config_of_run, find_run
from emcl.train.watchdog import Watchdog

Result = TypeVar("Result")


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

    With `init`, training starts from the weights of an earlier run, of the same tasks or of others. `resume` is a run's
    folder, its name, or `auto`.

    All settings are checked before a process group or a folder is created.

    Raises:
        UserError: one line for the user.
    """
    init = RunFolder.open(init).export if init else None
    resumed = find_run(resume, tasks, overrides) if resume else None
    config = config_of_run(tasks, recipe, overrides, evaluate=evaluate_path, resumed=resumed)
    expected = distributed.described()
    _check(config, expected, training=evaluate_path is None)
    opened = open_splits(config, init, begun=resumed is not None) if evaluate_path is None else None
    set_arithmetic(config)
    distributed.quiet_start()
    ranks = distributed.start()
    device = distributed.device()
    with (
        ExitStack() as at_end,
        _Recorded() as recorded,
        Watchdog(ranks, config.patience, at_end=recorded.failed) as watchdog,
    ):
        if opened is None:
            assert evaluate_path is not None
            folder = RunFolder.open(evaluate_path)
            folder.check_written()
            recorded.tracker = open_tracker(config, f"evaluate {folder.name}", first_rank=ranks.first)
            watchdog.slow("opening the model")
            model = _best_model(folder, config, ranks).to(device)
            factors = _kept_factors(folder, config, model, ranks, device)
            return _score(model, factors, folder, config, ranks, device, recorded.tracker, watchdog, step=0)
        folder = at_end.enter_context(_claimed(ranks, config, resumed))  # until all is recorded
        return _train(*opened, ranks, device, folder, recorded, watchdog, resuming=resumed is not None, init=init)


def _train(
    config: Config,
    training: Split,
    val: Split | None,
    ranks: Ranks,
    device: torch.device,
    folder: RunFolder,
    recorded: _Recorded,
    watchdog: Watchdog,
    *,
    resuming: bool,
    init: Path | None,
) -> dict[str, Scores]:
    few = too_few_cores(ranks.gather_objects(host_and_cores()), config.data.workers)
    if few and ranks.first:
        print(f"note: {few}", flush=True)
    if config.precision == "clip_fp16" and device.type == "cpu" and ranks.first:
        print("note: precision=clip_fp16 is slow on a CPU: its products in fp16 are made for GPUs", flush=True)
    # before anything is recorded, since it may raise
    trainer = Trainer(config, training, val, ranks, device, folder, init=init, resuming=resuming, watchdog=watchdog)
    trainer.check()
    continued = folder.facts().get("mlflow_run") if resuming else None
    tracker = open_tracker(config, folder.name, first_rank=ranks.first, continued=continued, unsent=folder.unsent)
    recorded.tracker = tracker
    if ranks.first:
        facts = {
            "tracking": tracker.uri,
            "mlflow_run": tracker.run_id or continued,
            "ranks": ranks.world_size,
            TOWERS: trainer.towers,
            EVALUATIONS: trainer.evaluations,
            INIT: str(init) if init else folder.facts().get(INIT) if resuming else None,
        }
        folder.write_start(to_yaml(config), facts)
        tracker.text(to_yaml(config, secrets=False), folder.config_file.name)
        print(
            f"{folder.name}: {', '.join(config.tasks)} on {ranks.world_size} {device.type} process(es), "
            f"{trainer.parameters / 1e6:.1f} M parameters, {len(training)} videos, {trainer.total} steps of "
            f"{config.data.batch_size}, {Path(config.deepspeed).stem}, {config.precision}",
            flush=True,
        )
        for note in filter(None, (trainer.taken, trainer.resumed)):
            print(note, flush=True)
    trainer.train(tracker)
    total, training = trainer.total, trainer.training
    val = trainer.val if config.evaluate.select == "val" else None  # never the test split
    del trainer
    if ranks.first:
        (folder.best / FACTORS).unlink(missing_ok=True)  # of this run before it was resumed, with other settings
    scores, wanted = {}, pair_factors.wanted(config)
    if wanted or config.data.test:
        watchdog.slow("opening the best model")
        model = _best_model(folder, config, ranks).to(device)
        factors = _found_factors(model, training, val, folder, config, ranks, device, watchdog) if wanted else None
        del training, val
        if config.data.test:
            scores = _score(model, factors, folder, config, ranks, device, tracker, watchdog, step=total)
    if ranks.first:
        print(f"\nfiles of this run: {folder}/ (best/ is the exported model: emcl.load('{folder.best}'))")
        if tracker.uri:
            hint = f"mlflow ui --backend-store-uri {tracker.uri}" if tracker.uri.startswith("sqlite") else tracker.uri
            print(f"compare runs in MLflow: {hint}")
    return scores


def _found_factors(
    model: VideoLanguageModel,
    training: Split,
    val: Split | None,
    folder: RunFolder,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    watchdog: Watchdog,
) -> SharedFactors | None:
    """Shared factors of the run's best model, found in the training split and kept in its export.

    A run whose pairs allow none says so, and ends as it would have without.
    """
    watchdog.slow("finding shared factors")
    begun_with = ranks.from_first(folder.facts().get(INIT))  # a run that may have trained the towers on these pairs
    learnt = bool(begun_with) or not {"image", "text"} <= set(config.model.frozen)
    began = time.perf_counter()
    try:
        factors = pair_factors.find_factors(
            model, training, val, config, ranks, device, learnt=learnt, progress=watchdog.progress
        )
        keep = partial(pair_factors.save_factors, factors, folder.export, model, config)
        _agreed(ranks, keep if ranks.first else lambda: None)
    except UserError as reason:
        if ranks.first:
            print(f"note: no shared factors: {reason}", flush=True)
        return None
    if ranks.first:
        names = [name for name in model.heads if weight_of(factors, name)]
        counts = ", ".join(f"{name} {weight_of(factors, name):g}" for name in names)
        print(f"{described_factors(factors)} in {time.perf_counter() - began:.0f} s; weight: {counts}", flush=True)
    return factors


def _kept_factors(
    folder: RunFolder, config: Config, model: VideoLanguageModel, ranks: Ranks, device: torch.device
) -> SharedFactors | None:
    """Those of an export, on the device; None where they are not wanted, or it has none, which is said."""
    if not pair_factors.wanted(config):
        return None
    factors = _agreed(ranks, lambda: pair_factors.open_factors(folder.export, model.backbone))
    if factors is None and ranks.first:
        print(f"note: scored without shared factors: {folder.export} has none", flush=True)
    return None if factors is None else factors.to(exact_device(device))


def _score(
    model: VideoLanguageModel,
    factors: SharedFactors | None,
    folder: RunFolder,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    tracker: Tracker,
    watchdog: Watchdog,
    *,
    step: int,
) -> dict[str, Scores]:
    """The run's best model on the test split."""
    watchdog.slow("scoring the test split")
    test = open_split(str(config.data.test), tokenizer_of(config))
    test = with_features(test, config, model.backbone, ranks, device, progress=watchdog.progress)
    scores = evaluate(model, test, config, ranks, device, name="test", factors=factors, progress=watchdog.progress)
    notes = folder.training_notes()
    scores = {name: replace(item, protocol=item.protocol + notes) for name, item in scores.items()}
    if ranks.first:
        files_of = split_name("test", config)
        record(scores, test, config, folder, tracker, name=files_of, step=step)
        for name, item in scores.items():
            print(f"\n{name} on {files_of}\n{table(item)}", flush=True)
        if chosen := folder.chosen():
            print(f"({chosen})", flush=True)
    return scores


def _best_model(folder: RunFolder, config: Config, ranks: Ranks) -> VideoLanguageModel:
    """The run's best model, the same on every rank; raises if a training run replaces it meanwhile."""
    seen = []

    def opened() -> VideoLanguageModel:
        export = folder.export
        seen.append(export_identity(export))
        model, _ = open_export(export, config)
        seen.append(export_identity(export))
        return model

    model = _agreed(ranks, opened)
    if len({identity for both in ranks.gather_objects(seen) for identity in both}) > 1:
        raise UserError(f"{folder.best} was replaced while it was opened: try again")
    return model


def _agreed(ranks: Ranks, call: Callable[[], Result]) -> Result:
    """What `call` returns; raises any rank's UserError on all of them."""
    try:
        result, error = call(), None
    except UserError as wrong:
        error = wrong
    ranks.agree(error)
    return result


def _check(config: Config, ranks: Ranks, *, training: bool) -> None:
    """Checks what would fail later: batch size, shards, weights, DeepSpeed file. Renders the sample set if needed."""
    check_limits(config)
    check_components(config, training=training)
    check_rescoring(config.evaluate.rescoring, config.evaluate.rescoring_options)
    backbone = backbone_class(config.model)
    backbone.check(config)
    kinds = check_tasks(config)
    patterns = wanted(config.data, training=training)
    if training:
        check_divisible(config.data.batch_size, ranks.world_size, config.optim.accumulation)
        deepspeed_settings(config, ranks.world_size)
        for error in backbone.missing_weights(config.model):
            raise UserError(error)
    if ranks.first and ((training and config.data.val) or config.data.test):
        for notice in [line for kind in dict.fromkeys(kinds.values()) for line in kind.notices()]:
            print(f"note: {notice}", flush=True)
    made = of_sample(config.data, patterns)
    for pattern in patterns:
        if pattern not in made:  # errors come before minutes of rendering
            find_shards(pattern)
    if missing(made):
        _render(Path(config.data.train).parent, made)


def _render(folder: Path, patterns: list[str]) -> None:
    """Renders the sample set, in the first process on this disk; the others wait for it.

    Raises:
        UserError: its shards are not those of `patterns`.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with in_turn(folder.parent / f".{folder.name}.lock"):
        if missing(patterns):
            generate(folder, seed=0)
    for pattern in patterns:
        find_shards(pattern)


def _claimed(ranks: Ranks, config: Config, resumed: RunFolder | None) -> RunFolder:
    """The folder of a new or a resumed run, which rank 0 locks; its error is raised on all ranks."""
    folder, error = None, None
    if ranks.first:
        try:
            if resumed is None:
                folder = RunFolder.create(Path(config.runs), config.name, list(config.tasks))
            else:
                folder = RunFolder.resume(resumed.path)
        except UserError as caught:
            error = caught
    ranks.agree(error)
    path = ranks.from_first(folder.path if folder else None)
    if resumed is not None and resumed.path != path:  # each rank has searched for the newest
        error = UserError(f"--resume found {path} and then {resumed}, since another run has saved: name one of them")
    ranks.agree(error)
    return folder or RunFolder(path)


class _Recorded:
    """Ends the tracked run, if there is one, with the status of its `with` block."""

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
