"""A run's folder: a name that is taken is refused, `--resume` finds the right run, a run is read wherever it lies."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import launch, small
from emcl import distributed
from emcl import launch as launcher
from emcl.config import resolve, to_yaml
from emcl.disk import aside, replace_folder
from emcl.distributed import ALONE
from emcl.errors import UserError
from emcl.run_folder import RunFolder, checkpoints_in, saved_config
from emcl.run_lock import RunLock
from emcl.tracking import Tracker
from emcl.train import checkpoint, loop
from emcl.train import run as run_module
from emcl.train.initialization import open_splits
from emcl.train.loop import Trainer
from emcl.train.preemption import Stopped
from emcl.train.run import run
from emcl.train.run_config import config_of_run, find_run


def make_run(path: Path, *tasks: str, steps: tuple[int, ...] = (), age: int = 0) -> RunFolder:
    """A run's settings and so many checkpoints, empty ones, which are `age` seconds old."""
    folder = RunFolder(path)
    folder.path.mkdir(parents=True)
    folder.config_file.write_text(to_yaml(resolve(tasks or ["retrieval"])))
    for step in steps:
        made = folder.checkpoints / f"step-{step:08d}"
        made.mkdir(parents=True)
        (made / "manifest.json").write_text("{}")
        then = made.stat().st_mtime - age
        os.utime(made, (then, then))
    return folder


def make_export(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(to_yaml(resolve(["retrieval"])))
    (path / "model.safetensors").touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_name_that_is_taken_is_refused_and_nothing_of_the_run_is_touched(tmp_path: Path) -> None:
    taken = make_run(tmp_path / "one", steps=(4, 8))
    before = {path: path.stat().st_mtime_ns for path in taken.path.rglob("*")}
    with pytest.raises(
        UserError, match=r"one is a run already \(step-00000008\): --resume .* goes on with it, another"
    ):
        RunFolder.create(tmp_path, "one", ["retrieval"])
    assert {path: path.stat().st_mtime_ns for path in taken.path.rglob("*")} == before


@pytest.mark.parametrize("kept", ["best/model.safetensors", "scores-test.json", "model.safetensors"])
def test_a_folder_with_a_model_or_scores_is_taken_too(kept: str, tmp_path: Path) -> None:
    (tmp_path / "one" / kept).parent.mkdir(parents=True)
    (tmp_path / "one" / kept).touch()
    with pytest.raises(UserError, match="one is a run already .*: another name= begins another"):
        RunFolder.create(tmp_path, "one", ["retrieval"])


def test_a_run_that_ended_before_it_saved_anything_begins_anew_and_counts_nothing_of_it(tmp_path: Path) -> None:
    """As a SLURM job that is requeued before its first checkpoint does."""
    begun = make_run(tmp_path / "one")
    begun.bad_clips.write_text("an old one\n")
    begun.unsent.write_text("[]")
    (begun.checkpoints / "step-00000007.part").mkdir(parents=True)
    with RunFolder.create(tmp_path, "one", ["retrieval"]) as again:
        assert names(again.path) == [".lock", "checkpoints", "config.yaml"]
        assert names(again.checkpoints) == []


def test_a_run_that_ended_between_its_first_model_and_its_first_checkpoint_begins_anew(
    sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = [*small(sample_shards), "name=one", "data.val=null", "data.test=null", "optim.max_steps=1"]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="step-00000001 could not be saved"):
        patch.setattr(checkpoint, "_finish", full)
        run(["retrieval"], overrides=command)
    folder = RunFolder(Path("runs/one"))
    assert folder.best.is_dir() and not folder.whole_checkpoints()
    run(["retrieval"], overrides=command)
    assert len(folder.whole_checkpoints()) == 1
    shutil.rmtree(folder.checkpoints)  # by someone who wants the model alone
    with pytest.raises(UserError, match=r"one is a run already \(best\): another name="):
        run(["retrieval"], overrides=command)


def test_a_full_disk_makes_no_folder_after_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("emcl.run_folder.RunLock", full)
    with pytest.raises(UserError, match="No space left on device"):
        RunFolder.create(tmp_path / "runs", None, ["retrieval"])
    assert names(tmp_path) == []


def test_names_made_by_the_platform_are_never_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emcl.run_folder.time.strftime", lambda _: "now")
    made = [RunFolder.create(tmp_path, None, ["retrieval", "captioning"]) for _ in range(3)]
    assert [folder.name for folder in made] == [f"retrieval-captioning-now{end}" for end in ("", "-2", "-3")]


def test_a_folder_that_nothing_came_into_goes_with_what_was_made_for_it(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "a" / "runs", "one", ["retrieval"]):
        pass
    assert names(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with RunFolder.create(tmp_path, "empty", ["retrieval"]):
        pass
    with RunFolder.create(tmp_path, "one", ["retrieval"]) as folder:
        folder.write_start("", {})
    assert names(tmp_path) == ["empty", "one"]


def test_a_folder_that_goes_leaves_the_lock_of_whoever_has_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = RunLock.release

    def then_another_comes(lock: RunLock, *, remove: bool = False) -> None:
        release(lock, remove=remove)
        lock.path.write_text("another's")

    folder = RunFolder.create(tmp_path, "one", ["retrieval"])
    monkeypatch.setattr(RunLock, "release", then_another_comes)
    folder.release()
    assert (tmp_path / "one/.lock").read_text() == "another's"


def test_a_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs").touch()
    for name in ("one", None):
        with pytest.raises(UserError, match="cannot be written to"):
            RunFolder.create(tmp_path / "runs", name, ["retrieval"])


def test_a_run_is_held_by_one_process_and_by_none_that_was_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from emcl.run_folder import RunFolder\n"
        f"held = RunFolder.create(Path({str(tmp_path)!r}), 'one', ['retrieval'])\n"
        "print('held', flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"one is in use by process {other.pid} on"):
        RunFolder.create(tmp_path, "one", ["retrieval"])
    other.kill()
    other.wait()
    with RunFolder.create(tmp_path, "one", ["retrieval"]), pytest.raises(UserError, match="in use"):
        RunFolder.create(tmp_path, "one", ["retrieval"])


def test_a_lock_that_its_holder_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits at the file of a run that ends would hold what nobody else sees."""
    path, lock = tmp_path / ".lock", fcntl.flock

    def late(*arguments: Any) -> None:
        if not path.with_name("removed").exists():
            path.rename(path.with_name("removed"))
        lock(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        held = RunLock(path)
    with pytest.raises(UserError, match="in use"):
        RunLock(path)
    held.release(remove=True)
    RunLock(path).release()


def test_a_file_system_without_locks_is_none_that_is_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(fcntl, "flock", none)
    with RunFolder.create(tmp_path, "one", ["retrieval"]) as folder:
        assert (folder.path / ".lock").is_file()


def test_a_run_its_best_model_and_a_copied_export_are_opened(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "runs/one")
    with pytest.raises(UserError, match="holds no export .*: no epoch of it has ended"):
        _ = RunFolder.open(folder.path).export
    make_export(folder.best)
    for path in (folder.path, folder.best):
        opened = RunFolder.open(path)
        assert (opened.path, opened.export, opened.name) == (folder.path, folder.best, "one")
    shutil.copytree(folder.best, tmp_path / "elsewhere/best")
    alone = RunFolder.open(tmp_path / "elsewhere/best")
    assert alone.path == alone.export == tmp_path / "elsewhere/best"
    assert alone.scores("test").parent == alone.path
    around = RunFolder.open(tmp_path / "elsewhere")  # which has no settings of its own
    assert (around.path, around.export) == (tmp_path / "elsewhere", tmp_path / "elsewhere/best")
    assert around.config() == saved_config(around.export)
    make_run(tmp_path / "runs/best")
    assert RunFolder.open(tmp_path / "runs/best").name == "best"


@pytest.mark.parametrize(("path", "named"), [("nowhere", "no such directory"), (".", "holds no config.yaml")])
def test_what_is_no_run_is_named(path: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=named):
        RunFolder.open(tmp_path / path)


def test_the_newest_run_goes_on_of_the_tasks_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/old"), "retrieval", steps=(9,), age=100)
    make_run(Path("runs/new"), "captioning", "retrieval", steps=(3,), age=10)
    make_run(Path("runs/none"), "retrieval")
    make_run(Path("other/there"), "retrieval", steps=(1,))
    assert find_run("auto").name == "new"
    assert find_run("auto", ["retrieval"]).name == "old"
    assert find_run("auto", ["retrieval", "captioning"]).name == "new"
    assert find_run("auto", overrides=["name=old"]).name == "old"
    assert find_run("auto", overrides=["runs=other"]).path == Path("other/there")
    Path("old").mkdir()  # something else
    monkeypatch.setenv("WHERE", "other")
    assert find_run("auto", overrides=["runs=${oc.env:WHERE}", "name=null"]).path == Path("other/there")
    for resume in ("old", "runs/old", "runs/old/best"):
        assert find_run(resume, overrides=["name=old"]).path == Path("runs/old")
    for resume, tasks, overrides, named in (
        ("auto", ["msrvtt_qa"], [], "no run of msrvtt_qa with a whole checkpoint in runs/"),
        ("auto", None, ["name=nothing"], "runs/nothing: no run's folder"),
        ("auto", None, ["runs=nowhere"], "no run with a whole checkpoint in nowhere/"),
        ("none", None, [], "runs/none: it has no whole checkpoint; start it anew"),
        ("runs/old/checkpoints/step-00000009", None, [], "no run's folder; give its run, runs/old"),
        ("auto", None, ["runs=${oc.env:NOWHERE}"], r"runs=\$.*NOWHERE"),
        ("runs/old", None, ["name=new"], "runs/old goes on under its own name, not as name=new"),
    ):
        with pytest.raises(UserError, match=named):
            find_run(resume, tasks, overrides)


def test_a_run_goes_on_with_its_own_tasks_and_is_scored_on_those_that_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one", "captioning", "retrieval", steps=(3,))
    make_export(folder.best)
    shutil.copy(folder.config_file, folder.best)

    def tasks(named: list[str] | None, evaluate: bool) -> list[str]:
        which = {"evaluate": folder.path if evaluate else None, "resumed": None if evaluate else folder}
        return list(config_of_run(named, None, [], **which).tasks)  # type: ignore[arg-type]

    for named in (None, ["retrieval", "captioning"], ["all"]):
        assert sorted(tasks(named, evaluate=False)) == ["captioning", "retrieval"]
    assert tasks(["retrieval"], evaluate=True) == ["retrieval"]
    assert tasks(None, evaluate=True) == tasks(["all"], evaluate=True) == ["captioning", "retrieval"]
    with pytest.raises(UserError, match=r"own tasks \(captioning, retrieval\), not with retrieval; --init"):
        tasks(["retrieval"], evaluate=False)
    with pytest.raises(UserError, match="was not trained for captionin, did you mean 'captioning'"):
        tasks(["captionin"], evaluate=True)


@pytest.mark.parametrize(
    "arguments",
    [
        "--resume --recipe sample", "--resume x --init y", "--resume x --evaluate y", "--evaluate x --init y",
        "--evaluate x --dry-run", "--evaluate x --profile 3",
    ],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        launcher.parse(arguments.split())
    said = capsys.readouterr().err
    assert "exclude each other: " in said and said.count("\n") == 1


def test_a_setting_after_resume_is_none_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/lr=3"))
    long = f"data.train={'x' * 300}/y.tar"
    for resume, expected in (("optim.epochs=9", "auto"), (long, "auto"), ("lr=3", "lr=3"), ("runs/lr=3", "runs/lr=3")):
        options = launcher.parse(["--resume", resume, "seed=3"])
        assert options.resume == expected
        assert options.overrides == [*([resume] if expected == "auto" else []), "seed=3"]


def test_a_profile_is_of_the_call_that_asked_for_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one", steps=(3,))
    folder.config_file.write_text(to_yaml(resolve(["retrieval"], overrides=["tracking.profile=10"])))
    for overrides, steps in (([], 0), (["tracking.profile=4"], 4)):
        assert config_of_run(None, None, overrides, evaluate=None, resumed=folder).tracking.profile == steps


def test_no_whole_checkpoint_goes_before_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run went back to step 4, since those of 8 and 12 are damaged; with `keep=1` it saves at 6, then at 8."""
    folder = make_run(tmp_path / "one", steps=(2, 4, 8, 12)).checkpoints
    (folder / "step-00000005.part").mkdir()
    remove = shutil.rmtree
    gone: list[str] = []

    def watched(path: Path, **options: bool) -> None:
        if not path.exists():
            return
        gone.append(path.name)
        assert new in checkpoints_in(folder) and (new / "state").read_text() == str(step)
        remove(path, **options)

    monkeypatch.setattr("emcl.train.checkpoint.shutil.rmtree", watched)
    for step, removed in ((6, ["step-00000002", "step-00000004", "step-00000008", "step-00000012"]), (8, [])):
        if step == 8:  # as if that one, damaged, had stayed
            shutil.copytree(folder / "step-00000006", folder / "step-00000008")
        new = folder / f"step-{step:08d}"
        unfinished = folder / f"{new.name}.part"
        unfinished.mkdir()
        (unfinished / "state").write_text(str(step))
        gone.clear()
        checkpoint._finish(unfinished, new, {}, keep=1)
        assert checkpoints_in(folder) == [new] and (new / "state").read_text() == str(step)
        assert set(removed) <= set(gone)
    assert names(folder) == ["step-00000008"]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_run(tmp_path / "one", steps=(2,)).checkpoints
    (folder / "step-00000004.part").mkdir()

    def busy(*_: Any, **__: Any) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr("emcl.train.checkpoint.replace_folder", lambda new, path: new.rename(path))
        patch.setattr(shutil, "rmtree", busy)
        checkpoint._finish(folder / "step-00000004.part", folder / "step-00000004", {}, keep=1)
    assert "step-00000002 could not be removed (Device or resource busy)" in capsys.readouterr().out
    assert checkpoints_in(folder)[-1].name == "step-00000004"


def test_a_model_that_a_kill_left_aside_is_found(tmp_path: Path) -> None:
    make_export(tmp_path / "one/best")
    (tmp_path / "one/config.yaml").touch()
    (tmp_path / "one/best").rename(aside(tmp_path / "one/best"))
    assert RunFolder.open(tmp_path / "one").export == tmp_path / "one/.best.old"
    make_export(tmp_path / "new")
    replace_folder(tmp_path / "new", tmp_path / "one/best")
    assert RunFolder.open(tmp_path / "one").export == tmp_path / "one/best"


def test_a_stop_at_the_end_of_an_epoch_saves_once(
    sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*small(sample_shards), "data.val=null", "data.workers=0", "tracking.every_steps=3"]
    config = resolve(["retrieval"], overrides=settings)
    saved: list[int] = []
    monkeypatch.setattr(loop.checkpoint, "save", lambda *arguments, **_: saved.append(arguments[2]))
    ranks = distributed.start()
    with RunFolder.create(tmp_path, "run", ["retrieval"]) as folder:
        trainer = Trainer(*open_splits(config), ranks, torch.device("cpu"), folder)
        trainer.stop.asked = True
        with pytest.raises(Stopped, match="saved at step 3 of 6"):
            trainer.train(Tracker())
    assert trainer.per_epoch == 3 and saved == [3]


@pytest.fixture(scope="module")
def whole(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of two tasks, which are weighed by learned uncertainties; scored on nothing yet."""
    runs = tmp_path_factory.mktemp("whole")
    quick = ["optim.max_steps=2", "data.val=null", "data.test=null", "uncertainty_weights=true"]
    run(["retrieval", "msrvtt_qa"], overrides=[*small(sample_shards), *quick, f"runs={runs}", "name=one"])
    return runs / "one"


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> RunFolder:
    """A copy of that run, to be changed."""
    shutil.copytree(whole, tmp_path / "runs/one")
    return RunFolder(tmp_path / "runs/one")


@pytest.mark.xdist_group("run_folder")
def test_a_task_is_scored_alone_as_it_is_among_all_and_the_others_scores_stay(
    folder: RunFolder, sample_shards: Path
) -> None:
    test = [f"data.test={sample_shards}/test-000000.tar", "evaluate.batch_size=5"]
    every = run(None, overrides=test, evaluate_path=folder.path)
    before = json.loads(folder.scores("test").read_text())
    assert list(every) == ["retrieval", "msrvtt_qa"]
    for path in folder.path.glob("*msrvtt_qa*"):
        path.unlink()
    alone = run(["msrvtt_qa"], overrides=test, evaluate_path=folder.best)
    assert list(alone) == ["msrvtt_qa"] and alone["msrvtt_qa"].metrics == every["msrvtt_qa"].metrics
    after = json.loads(folder.scores("test").read_text())
    assert {name: item["metrics"] for name, item in after["tasks"].items()} == {
        name: item["metrics"] for name, item in before["tasks"].items()
    }
    assert folder.items("msrvtt_qa", "test").is_file() and folder.table("msrvtt_qa", "test").is_file()


@pytest.mark.xdist_group("run_folder")
@pytest.mark.parametrize("change", ["samples", "model"])
def test_scores_of_other_samples_or_another_model_do_not_stand_beside_each_other(
    change: str, folder: RunFolder, sample_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As many samples, and a model in the same place."""
    first, second = (f"data.test={sample_shards}/{split}-000000.tar" for split in ("test", "train"))
    run(["retrieval"], overrides=[first], evaluate_path=folder.path)
    if change == "model":
        (folder.best / "scores.json").write_text("{}")
    run(["msrvtt_qa"], overrides=[first if change == "model" else second], evaluate_path=folder.path)
    summary = json.loads(folder.scores("test").read_text())
    assert (list(summary["tasks"]), summary["samples"]) == (["msrvtt_qa"], 12)
    assert "note: the scores of retrieval in" in capsys.readouterr().out


@pytest.mark.xdist_group("run_folder")
def test_a_model_that_is_replaced_while_it_is_opened_is_not_scored(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = run_module.open_export

    def replaced(*arguments: Any) -> Any:
        model = opened(*arguments)
        (folder.best / "scores.json").write_text("{}")
        return model

    monkeypatch.setattr(run_module, "open_export", replaced)
    with pytest.raises(UserError, match="best was replaced while it was opened"):
        run_module._best_model(folder, saved_config(folder.best), ALONE)
    (folder.best / "model.safetensors").unlink()
    monkeypatch.setattr(RunFolder, "export", folder.best)
    with pytest.raises(UserError, match="has gone while it was opened"):
        run_module._best_model(folder, saved_config(folder.best), ALONE)


@pytest.mark.xdist_group("run_folder")
def test_a_finished_run_is_scored_again_on_a_full_disk(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 0)
    assert run(None, resume=str(folder)) == {}
    with pytest.raises(UserError, match="a checkpoint with a best model could not be saved"):
        run(None, resume=str(folder), overrides=["optim.max_steps=3"])


@pytest.mark.xdist_group("run_folder")
def test_the_command_refuses_a_second_run_of_a_name_and_goes_on_with_the_first(
    folder: RunFolder, sample_shards: Path, tmp_path: Path
) -> None:
    before = names(folder.checkpoints)
    done = launch("--task", "retrieval,msrvtt_qa", *small(sample_shards), "name=one", cwd=tmp_path, ranks=2)
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: runs/one is a run already \(step-00000002\): --resume runs/one .*\n", done.stderr)
    assert names(folder.checkpoints) == before
    done = launch("--resume", "optim.max_steps=3", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "one: retrieval, msrvtt_qa on 2 cpu" in done.stdout and "goes on from step 2 of 3" in done.stdout
    folder.facts_file.write_text(json.dumps({**folder.facts(), "mlflow_run": "known"}))
    done = launch("--resume", "one", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all 3 steps are done" in done.stdout
    assert folder.facts()["mlflow_run"] == "known"  # though this time nothing was recorded


@pytest.mark.xdist_group("run_folder")
def test_a_disk_without_room_for_a_checkpoint_is_found_before_the_first_step(
    sample_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 1000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"a checkpoint with a best model could not be saved .*needs \d+ MiB"):
        run(["retrieval"], overrides=[*small(sample_shards), "name=one"])
    assert names(tmp_path) == []
