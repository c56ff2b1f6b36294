"""The training loop: global batch i, one step; checkpoints, validation and the best model in between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from emcl.config import Config
from emcl.data.batch import Batch
from emcl.data.image_ops import augmented
from emcl.data.resilient_loader import ResilientLoader
from emcl.data.sampler import RankBatchSampler
from emcl.data.split import Split
from emcl.distributed import Ranks
from emcl.errors import UserError
from emcl.evaluate.driver import evaluate
from emcl.evaluate.results import as_json
from emcl.model.feature_cache import feature_paths, identify_towers, with_features
from emcl.multitask import VideoLanguageModel, collators, total_loss
from emcl.run_folder import EVALUATIONS, SAVED, TOWERS, RunFolder
from emcl.task import Scores
from emcl.tracking import Tracker
from emcl.train import checkpoint
from emcl.train.bad_clips import BadClips
from emcl.train.deepspeed_file import zero_stage
from emcl.train.engine import build_engine, weights
from emcl.train.export import save_export
from emcl.train.initialization import start_from
from emcl.train.malloc import keep_freed_memory
from emcl.train.meter import Meter
from emcl.train.optimizer import group_names
from emcl.train.preemption import Stopped, StopRequest
from emcl.train.profile import WARM, StepProfile, phase
from emcl.train.watchdog import Watchdog

LOSS_SCALES = 17
"""Steps that fp16 may skip at its start: each halves the loss scale."""

STRAGGLERS_KEPT = 1000
"""Lines about stragglers in the run's record."""

Step = tuple[list[Batch], float]
"""A step's micro-batches and the seconds spent waiting for them."""


class Trainer:
    """Trains one configuration. All ranks create one and call the same methods."""

    tracker: Tracker
    best: float | None

    def __init__(
        self,
        config: Config,
        training: Split,
        val: Split | None,
        ranks: Ranks,
        device: torch.device,
        folder: RunFolder,
        *,
        init: Path | None = None,
        resuming: bool = False,
        watchdog: Watchdog | None = None,
    ) -> None:
        """`config`, `training` and `val` are what `open_splits` gives.

        With `resuming`, the run in `folder` continues, on any number of ranks; `watchdog` is told about progress.

        Raises:
            UserError: a batch size that the ranks do not divide; weights or a checkpoint that do not fit.
        """
        assert training.sampler is not None
        self.ranks, self.device, self.folder, self.config = ranks, device, folder, config
        self.per_epoch = training.sampler.steps_per_epoch
        self.total = min(config.optim.epochs * self.per_epoch, config.optim.max_steps or 2**62)
        self.batches = RankBatchSampler(
            training.sampler,
            rank=ranks.rank,
            world_size=ranks.world_size,
            accumulation=config.optim.accumulation,
            start=0,
            stop=self.total,
        )
        if device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.seed)  # the same start on all ranks
        model = VideoLanguageModel(config, ranks=ranks)
        self.taken = start_from(model, init, self.config) if init else None
        self.watchdog = watchdog or Watchdog(ranks, config.patience)
        self.names = group_names(model, config.optim)
        resumed_from = checkpoint.find(folder.checkpoints, ranks, zero_stage(config), config) if resuming else None
        universal = resumed_from is not None and resumed_from.universal
        self.towers = self._towers(model, [split for split in (training, val) if split], resumed_from)
        cached = partial(with_features, towers=self.towers, progress=self.watchdog.progress)
        self.training = cached(training, config, model.backbone, ranks, device)
        self.val = cached(val, config, model.backbone, ranks, device) if val else None
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.engine = build_engine(model, config, ranks, device, self.total, universal=universal)
        self.start, self.best = 0, None
        self.evaluations: int | None = 0  # None where a run of an earlier version did not count them
        if resumed_from is not None:
            state = checkpoint.load(self.engine, resumed_from)
            self.start = state["step"]
            if state.get("select", "val") == config.evaluate.select:  # scores of another split do not compare
                self.best, self.evaluations = state["best"], state.get(EVALUATIONS)
        self.saved = self.start
        self.resumed = _note_on_resuming(self.start, self.total) if resuming else None
        self.skipped, self.in_a_row = int(self.engine.skipped_steps), 0
        allowed = config.data.max_bad_fraction
        self.bad = BadClips(ranks, folder.bad_clips, len(training), allowed, training.shards.damaged)
        self.meter = Meter(config, ranks, device, self.bad)
        self.stragglers: list[str] = []
        self.stop = StopRequest()

    def _towers(
        self, model: VideoLanguageModel, splits: list[Split], resumed_from: checkpoint.FoundCheckpoint | None
    ) -> str | None:
        """Which towers the cached features are of, if there are any: those that the run began with.

        A run that is resumed has not been given what it began with, such as another run's weights: if its features
        are gone, they are computed by the towers of its checkpoint.
        """
        if not self.config.model.cache_features:
            return None
        built = identify_towers(model.backbone, self.ranks)
        if resumed_from is None:
            return built
        begun_with = self.folder.facts().get(TOWERS)
        there = begun_with and all(
            path.exists() for split in splits for path in feature_paths(split, self.config, begun_with)
        )
        begun_with, there = self.ranks.gather_objects((begun_with, there))[0]  # another rank may look later
        if there or built == begun_with:
            return str(begun_with)
        checkpoint.restore_untrained(model, resumed_from, self.names)
        return identify_towers(model.backbone, self.ranks)

    @property
    def model(self) -> VideoLanguageModel:
        return self.engine.module

    def check(self) -> None:
        """Checks what would fail later; called by all ranks before the first step.

        Raises:
            UserError: no room for a checkpoint, or no step for a profile.
        """
        left = self.total - self.start
        if left > 0:
            checkpoint.check_room(self.engine, self.folder.checkpoints, self.ranks)
        if self.config.tracking.profile and left <= WARM:
            raise UserError(f"--profile looks at steps after the first {WARM}; {left} are left of this run")

    def train(self, tracker: Tracker) -> None:
        """From the start, or from the checkpoint, to the last step.

        Raises:
            Stopped: a signal asked for it, and the run is saved.
        """
        self.tracker = tracker
        self.engine.train()
        bar = tqdm(
            total=self.total, initial=self.start, desc="training", unit="step", disable=not self.ranks.first,
            dynamic_ncols=True,
        )  # fmt: skip
        steps = self.config.tracking.profile if self.ranks.first else 0
        profile = StepProfile(steps, self.model, self.folder.profile, tracker, self._say)
        with self.stop, bar, profile:
            for step, (micro_batches, waited) in enumerate(self._steps(self.start), self.start):
                self.watchdog.step(step + 1, "training")
                profile.step()
                self._seed(step)
                losses = self._step(micro_batches)
                skipped = self._check_skipped(step, micro_batches)
                self.meter.add(losses, micro_batches, waited, skipped=skipped)
                bar.update()
                done = step + 1
                if done % self.config.tracking.every_steps == 0 or done == self.total:
                    self._report(bar, done)
                self._validate_and_save(done)
                if done < self.total and self._to_stop(done):
                    self._save(done)
                    raise Stopped(f"saved at step {done} of {self.total}; go on by --resume {self.folder}")

    def _steps(self, start: int) -> Iterator[Step]:
        task_collators = collators(self.config, self.training, training=True)
        self.loader = ResilientLoader(self.training, self.config.data, self.batches, task_collators)
        steps = self.loader.steps(start)
        for step in range(start, self.total):
            self.watchdog.step(step + 1, "loading")
            began = time.perf_counter()
            with phase("data"):
                micro_batches = next(steps)
            yield micro_batches, time.perf_counter() - began

    def _seed(self, step: int) -> None:
        """Random numbers of a step (dropout) depend on seed, step and rank alone: there is no state to resume."""
        torch.manual_seed(hash((self.config.seed, step, self.ranks.rank)) & 0x7FFFFFFF)

    def _step(self, micro_batches: list[Batch]) -> dict[str, Tensor]:
        clock, sums = self.meter.clock, dict[str, Tensor]()
        for batch in micro_batches:
            with clock.part("transfer"):
                batch = batch.to(self.device)
            with phase("forward"), clock.part("forward"):
                losses = self.engine(batch=augmented(batch))
                loss = total_loss(losses)
            with phase("backward"), clock.part("backward"):
                self.engine.backward(loss)
            with phase("optimizer"), clock.part("optimizer"):
                self.engine.step()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach() / len(micro_batches)
        return sums

    def _check_skipped(self, step: int, micro_batches: list[Batch]) -> bool:
        """Whether the step was skipped on all ranks, since the gradient's norm is not finite.

        Raises:
            UserError: too many in a row; this rank's last batch is kept for study.
        """
        count = int(self.engine.skipped_steps)  # DeepSpeed counts on the host, and has synchronised already
        skipped = count > self.skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.skipped = count
        if not skipped:
            return False
        self._say(f"step {step + 1}: the gradient is not finite; left out on all ranks ({self.in_a_row} in a row)")
        searching = self.config.precision == "fp16" and self.skipped == step + 1  # for its first loss scale, from 2^16
        if self.in_a_row >= self.config.optim.max_skipped + (LOSS_SCALES if searching else 0):
            plain = [dataclasses.asdict(batch) for batch in micro_batches]
            torch.save(plain, self.folder.bad_batch(step + 1, self.ranks.rank))
            raise UserError(
                f"{self.in_a_row} steps in a row had no finite gradient: lower optim.lr, or train with precision=fp32. "
                f"The batch is kept in {self.folder.bad_batch(step + 1, '*')}, the last checkpoint in "
                f"{self.folder.checkpoints}"
            )
        return True

    def _report(self, bar: tqdm[Any], done: int) -> None:
        metrics, straggler = self.meter.read(self.loader.restarts)
        if straggler:
            self._say(f"step {done}: {straggler}")
            self.stragglers.append(f"step {done}: {straggler}")
            self.tracker.text("\n".join(self.stragglers[-STRAGGLERS_KEPT:]), "stragglers.txt")
        bar.set_postfix_str(
            f"loss {metrics.get('train/loss', float('nan')):.3f}, {metrics['samples_per_second']:.0f} samples/s, "
            f"waiting {100 * metrics['data_wait_share']:.0f}%"
        )
        rates = {f"learning_rate/{group['name']}": group["lr"] for group in self.engine.optimizer.param_groups}
        self.tracker.metrics(
            {**metrics, **rates, "epoch": done / self.per_epoch, "skipped_steps": float(self.skipped)}, done
        )

    def _validate_and_save(self, done: int) -> None:
        """What is due after a step; the clock does not count it."""
        ends_epoch = done % self.per_epoch == 0 or done == self.total
        validates = self.val is not None and (done == self.total or self._validates(done))
        if validates or ends_epoch:
            self.watchdog.slow("at the end of an epoch" if ends_epoch else "validating")
        if validates:
            self._validate(done)
        elif done == self.total:
            self._export({}, done)
        if ends_epoch or done % self.config.checkpoint.every_steps == 0:
            self._save(done)
        if validates or ends_epoch:
            self.meter.restart()

    def _validates(self, done: int) -> bool:
        every_steps, every_epochs = self.config.evaluate.every_steps, self.config.evaluate.every_epochs
        return done % (every_steps or every_epochs * self.per_epoch) == 0

    def _validate(self, done: int) -> None:
        assert self.val is not None
        split = self.config.evaluate.select
        self.engine.eval()
        scores = evaluate(
            self.model, self.val, self.config, self.ranks, self.device, name=split, progress=self.watchdog.progress
        )
        self.engine.train()
        if self.evaluations is not None:
            self.evaluations += 1
        prefix = split if split == "val" else f"{split}_while_training"
        self.tracker.metrics(
            {f"{prefix}/{task}/{key}": value for task, item in scores.items() for key, value in item.metrics.items()},
            done,
        )
        when = f"step {done}" if self.config.evaluate.every_steps else f"epoch {-(-done // self.per_epoch)}"
        said = ", ".join(f"{name} {item.metrics[item.chosen]:.1f}" for name, item in scores.items())
        self._say(f"{when}: {said}")
        self._keep_best(scores, done)
        if self.ranks.first:
            self.folder.note(EVALUATIONS, self.evaluations)

    def _keep_best(self, scores: dict[str, Scores], done: int) -> None:
        signs = {name: 1.0 if task.greater_is_better else -1.0 for name, task in self.model.heads.items()}
        value = sum(signs[name] * item.metrics[item.chosen] for name, item in scores.items()) / len(scores)
        if self.best is None or value > self.best:
            self.best = value
            self._export(scores, done)

    def _export(self, scores: dict[str, Scores], done: int) -> None:
        state = weights(self.engine, self.ranks)
        if self.ranks.first:
            split = self.config.evaluate.select
            record = {**as_json(scores, self.val or self.training, split, self.config), "step": done}
            save_export(self.folder.best, state, self.config, record)
        self.ranks.barrier()

    def _to_stop(self, done: int) -> bool:
        """Whether any rank was asked to stop; the ranks agree only at steps where they wait for the device anyway."""
        if done % self.config.tracking.every_steps:
            return False
        return bool(self.ranks.maximum(torch.tensor(float(self.stop.asked), device=self.device)))

    def _save(self, done: int) -> None:
        if self.saved == done:  # asked to stop right after a save
            return
        self.watchdog.slow("saving")
        state = {"best": self.best, EVALUATIONS: self.evaluations, "select": self.config.evaluate.select}
        checkpoint.save(
            self.engine, self.folder.checkpoints, done, state, self.ranks, names=self.names, config=self.config
        )
        self.saved = done
        if self.ranks.first:
            self.folder.note(SAVED, True)

    def _say(self, text: str) -> None:
        if self.ranks.first:
            tqdm.write(text)


def _note_on_resuming(start: int, total: int) -> str:
    if start < total:
        return f"goes on from step {start} of {total}"
    return f"all {total} steps are done, so it is scored again; more optim.epochs= train on"
