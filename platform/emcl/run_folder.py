"""A run's folder: its file names, its lock, and its configuration.

Without PyTorch, so that errors about a given run come at once. In `runs/NAME/`:

    config.yaml, run.json             the settings, all resolved; where it is recorded, whether it has a checkpoint
    checkpoints/step-N/               what `--resume` continues from, the newest few
    best/                             the model chosen on validation, as an export: model.safetensors, config.yaml,
                                      scores.json, and factors.npz where it has some; `emcl.load` and `--evaluate` take
                                      it wherever it is copied to
    scores-SPLIT.json                 figures of an evaluation
    TASK-SPLIT.txt, TASK-SPLIT.png, items-TASK-SPLIT.json
                                      the same as a table and a picture; what they are made of
    embeddings-SPLIT.safetensors, similarity-SPLIT.safetensors, options-test.json, captions-SPLIT.json
                                      further files of tasks and of `emcl options`; with `TASK-` before it for another
                                      package's task, or for one under another name (`kinds`)
    bad_clips.txt, bad-batch-STEP-rankR.pt, profile/, mlflow_unsent.json
                                      what did not decode; batches without a finite gradient; output of `--profile`;
                                      what could not be sent to MLflow
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

from emcl.config import Config, from_dict
from emcl.disk import aside, why_not_written, write_whole
from emcl.errors import UserError
from emcl.recipe import read_yaml
from emcl.resources import is_file
from emcl.run_lock import InUseError, RunLock
from emcl.settings import Tree

RUNS = "runs"
CONFIG, WEIGHTS, EXPORT_SCORES, FACTORS = "config.yaml", "model.safetensors", "scores.json", "factors.npz"
"""Files of an export; a run's own settings have the same name."""
BEST = "best"
SAVED = "saved"
"""In `run.json`: whether a checkpoint was ever saved."""
EVALUATIONS = "evaluations"
"""In `run.json`: how many times the run was scored while training, for the best model."""
TOWERS = "towers"
"""In `run.json`: which towers the run's cached features are of."""
INIT = "init"
"""In `run.json`: which run's weights it began with, if any."""
STEP = "step-"
MANIFEST = "manifest.json"
"""In a checkpoint: how many ranks and which ZeRO stage wrote it, the optimiser's groups; size and checksum of every
other file. It is written last."""
EMBEDDINGS, SIMILARITY = "embeddings-{split}.safetensors", "similarity-{split}.safetensors"
"""What retrieval saves for a split; the second holds `similarity` (texts, videos)."""
CAPTIONS, OPTIONS = "captions-{split}.json", "options-{split}.json"
"""All captions of a split, in COCO's format; the results of `emcl options`."""


class TakenError(UserError):
    """A run has the name already."""


class RunFolder:
    """A run's folder. `create` and `resume` lock it for this process until the end of a `with`.

    `open` is for reading a run and for writing scores, which is allowed while it trains.
    """

    def __init__(self, path: Path) -> None:
        """Only builds names: reads and creates nothing."""
        self.path = path
        self.config_file, self.facts_file = path / CONFIG, path / "run.json"
        self.best, self.checkpoints = path / BEST, path / "checkpoints"
        self.bad_clips, self.unsent = path / "bad_clips.txt", path / "mlflow_unsent.json"
        self.profile = path / "profile"
        self._lock_file = path / ".lock"
        self._lock: RunLock | None = None
        self._made: list[Path] = []
        """The folders that were created, this one and its parents, innermost first: deleted if it stays empty."""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name if self.path.name not in ("", "..") else self.path.resolve().name

    def scores(self, split: str) -> Path:
        return self.path / f"scores-{split}.json"

    def table(self, task: str, split: str) -> Path:
        return self.path / f"{task}-{split}.txt"

    def picture(self, task: str, split: str) -> Path:
        return self.path / f"{task}-{split}.png"

    def items(self, task: str, split: str) -> Path:
        return self.path / f"items-{task}-{split}.json"

    def kept(self, name: str, split: str, *, alias: str = "") -> Path:
        """A further file that a task saves, such as EMBEDDINGS.

        Args:
            alias: prefix of its name (`Config.alias_of`), so that two tasks of a kind have separate files.
        """
        return self.path / f"{f'{alias}-' if alias else ''}{name.format(split=split)}"

    def bad_batch(self, step: int, rank: int | str) -> Path:
        return self.path / f"bad-batch-{step}-rank{rank}.pt"

    @classmethod
    def create(cls, runs: Path, name: str | None, tasks: Sequence[str]) -> RunFolder:
        """A new run below `runs`, locked by this process; without a name, one is made from tasks and time.

        Raises:
            UserError: a run has the name already, or the folder cannot be written.
        """
        wanted = name or f"{'-'.join(tasks)[:150]}-{time.strftime('%Y%m%d-%H%M%S')}"
        for number in count(1):
            folder = cls(runs / (wanted if number == 1 else f"{wanted}-{number}"))
            if name is not None:
                folder.check_new()
            try:
                folder._hold("runs= names another folder")
                folder.check_new()  # another process may have been faster
                folder._clear()
                return folder
            except (TakenError, InUseError):
                folder.release()
                if name is not None:
                    raise
        raise AssertionError("unreachable")

    @classmethod
    def resume(cls, path: Path) -> RunFolder:
        """A run to be continued, locked by this process.

        Raises:
            UserError: no run with a checkpoint there, or another process has locked it.
        """
        folder = cls(path)
        folder.check_resumable()
        folder._hold("a run that goes on writes there")
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens a run's folder, or an export, for reading. The `best/` of a run opens the run.

        Raises:
            UserError: neither is there.
        """
        if not path.exists():
            raise UserError(f"{path}: no such directory (give a run's folder, such as {RUNS}/NAME, or an export in it)")
        folder = cls.around(path)
        if not folder.has_config() and not is_file(folder.best / CONFIG):
            raise UserError(f"{path} holds no {CONFIG}, so it is no run; give a run's folder, such as {RUNS}/NAME")
        return folder

    @classmethod
    def around(cls, path: Path) -> RunFolder:
        """The run of this folder, or the run whose `best/` it is."""
        return cls(path.parent if path.name == BEST and cls(path.parent).has_config() else path)

    @property
    def export(self) -> Path:
        """The directory of the best model: `best/`, or the folder itself if it is an export.

        Raises:
            UserError: there is none.
        """
        for candidate in (self.best, aside(self.best), self.path):
            if is_file(candidate / WEIGHTS) and is_file(candidate / CONFIG):
                return candidate
        raise UserError(f"{self} holds no export ({WEIGHTS} and {CONFIG}): no epoch of it has ended yet")

    def has_config(self) -> bool:
        """Whether it is a run, or an export, at all."""
        return is_file(self.config_file)

    def whole_checkpoints(self) -> list[Path]:
        """The finished checkpoints, oldest first; their checksums are not verified."""
        return checkpoints_in(self.checkpoints)

    def config(self) -> Config:
        """The run's settings; those of the export if it is only that.

        Raises:
            UserError: its file is wrong.
        """
        return saved_config(self.path if self.has_config() else self.export)

    def facts(self) -> dict[str, Any]:
        """What `run.json` says: where the run is recorded, whether it has saved a checkpoint."""
        try:
            facts = json.loads(self.facts_file.read_text())
        except (OSError, ValueError):
            return {}
        return facts if isinstance(facts, dict) else {}

    def write_start(self, config_yaml: str, facts: dict[str, Any]) -> None:
        """Writes the configuration and `run.json` at the start."""
        write_whole(self.config_file, config_yaml)
        write_whole(self.facts_file, json.dumps({**facts, SAVED: bool(self.whole_checkpoints())}, indent=1))

    def note(self, name: str, value: Any) -> None:
        """Adds to `run.json`. With SAVED it can be resumed, and its name is taken."""
        facts = self.facts()
        if facts.get(name) != value:
            write_whole(self.facts_file, json.dumps({**facts, name: value}, indent=1))

    def training_notes(self) -> str:
        """A protocol's notes on a model that the test set chose, or that another gradient trained; else empty.

        They are the model's own, whatever the settings are with which it is scored.
        """
        chosen = "; MODEL CHOSEN ON THE TEST SET" if self._choice().get("split") == "test" else ""
        sliced = not saved_config(self.export).optim.gather_with_grad
        return chosen + ("; trained on each rank's own slice of the gradient" if sliced else "")

    def _choice(self) -> dict[str, Any]:
        """What its export says of the scores by which it was chosen."""
        try:
            record = json.loads((self.export / EXPORT_SCORES).read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(record, dict):
            return {}
        return record if record.get("tasks") else {"step": record.get("step")}

    def chosen(self) -> str:
        """How its model was chosen; empty where it does not say."""
        choice = self._choice()
        step, split = choice.get("step"), choice.get("split")
        if step is None:
            return ""
        if split is None:
            return f"model of step {step:,}, the last"
        times = self.facts().get(EVALUATIONS)
        best = f"the best of {times} evaluation{'s' if times > 1 else ''}" if times else "the best"
        return f"model of step {step:,}, {best} on {'THE TEST SET' if split == 'test' else split}"

    def check_written(self) -> None:
        """Raises UserError: scores cannot be written here."""
        if why := why_not_written(self.path):
            raise UserError(f"{self} keeps the scores of its model, and {why}: score a copy of it")

    def check_new(self) -> None:
        """Checks that a run may begin here; files of one that ended before its first checkpoint are ignored.

        Raises:
            TakenError: a run saved something, which would be overwritten.
        """
        checkpoints = self.whole_checkpoints()
        models = [path for path in (self.best, aside(self.best), self.path / WEIGHTS) if path.exists()]
        saved = [*checkpoints[-1:], *models, *sorted(self.path.glob("scores-*.json"))]
        if not saved or (not checkpoints and self.facts().get(SAVED) is False):
            return
        go_on = f"--resume {self} goes on with it, " if checkpoints else ""
        raise TakenError(f"{self} is a run already ({saved[0].name}): {go_on}another name= begins another")

    def check_resumable(self) -> None:
        """Raises UserError: no run here, or none that saved a checkpoint."""
        if not self.has_config():
            around = next((path for path in self.path.parents if RunFolder(path).has_config()), None)
            meant = f"; give its run, {around}" if around else f" (it would hold {CONFIG} and checkpoints/)"
            raise UserError(f"--resume {self}: no run's folder{meant}")
        if not self.whole_checkpoints():
            raise UserError(f"--resume {self}: it has no whole checkpoint; start it anew without --resume")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _hold(self, way_out: str) -> None:
        self._made = [path for path in (self.path, *self.path.parents) if not path.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = RunLock(self._lock_file)
        except OSError as error:
            if self._made:
                with suppress(OSError):  # nobody has held it
                    self._lock_file.unlink(missing_ok=True)
                self._remove_made()
            raise UserError(f"{self} cannot be written to ({error.strerror}); {way_out}") from None

    def release(self) -> None:
        """Releases the lock; deletes a folder that was created for it and has stayed empty."""
        if self._lock is None:
            return
        empty = bool(self._made) and self.path.is_dir() and list(self.path.iterdir()) == [self._lock_file]
        self._lock.release(remove=empty)
        self._lock = None
        if empty:
            self._remove_made()

    def _remove_made(self) -> None:
        with suppress(OSError):  # another run's lock is in there
            for path in self._made:
                path.rmdir()

    def _clear(self) -> None:
        """Deletes what an earlier run left that saved nothing: this one must not continue from it."""
        for path in (self.bad_clips, self.unsent):
            path.unlink(missing_ok=True)
        for leftover in self.checkpoints.glob(f"{STEP}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that were finished, oldest first."""
    named = [path for path in folder.glob(f"{STEP}*") if re.fullmatch(rf"{STEP}\d+", path.name)]
    return sorted((path for path in named if is_file(path / MANIFEST)), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(STEP))


def saved_config(folder: Path) -> Config:
    """What a run or an export was configured with.

    Raises:
        UserError: its file is wrong.
    """
    return from_dict([saved_settings(folder)], source=str(folder / CONFIG))


def tasks_in(saved: Tree) -> list[str]:
    """The tasks in `saved_settings` of a run."""
    tasks = saved.get("tasks")
    return list(tasks) if isinstance(tasks, dict) else []


def saved_settings(folder: Path) -> Tree:
    """What a run or an export was configured with as in its file, unchecked.

    Raises:
        UserError: it is no YAML.
    """
    saved = read_yaml(folder / CONFIG)
    if isinstance(saved.get("name"), str):
        saved["name"] = saved["name"].rpartition("/")[2]  # earlier versions took `a/b`
    return saved


def export_identity(export: Path) -> str:
    """Identifies a run's best model: a hash of the step and the scores by which it was chosen."""
    try:
        return hashlib.sha256((export / EXPORT_SCORES).read_bytes()).hexdigest()
    except OSError:
        return ""
