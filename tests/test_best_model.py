"""The model that is kept is the best by the task's own metric, in the metric's own direction."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import emcl_command, launch, small
from emcl.config import resolve
from emcl.errors import UserError
from emcl.task import Scores
from emcl.train.loop import Trainer


@pytest.mark.parametrize(("greater_is_better", "kept"), [(True, [1, 3]), (False, [1, 2])])
def test_only_a_better_score_is_exported(greater_is_better: bool, kept: list[int]) -> None:
    exported: list[int] = []
    task = SimpleNamespace(greater_is_better=greater_is_better)
    trainer: Any = Trainer.__new__(Trainer)
    trainer.best = None
    trainer.engine = SimpleNamespace(module=SimpleNamespace(heads={"task": task}))
    trainer._export = lambda scores, done: exported.append(done)
    for done, value in enumerate((5.0, 4.0, 6.0, 4.0), 1):
        trainer._keep_best({"task": Scores({"m": value}, "protocol", chosen="m")}, done)
    assert exported == kept


def steps_of(said: str) -> list[str]:
    return [line.split(":")[0] for line in said.splitlines() if line.startswith(("step ", "epoch "))]


@pytest.fixture(scope="module")
def by_test_set(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of five steps, validated every two on the test set, and what it printed; its folder is `runs/run`."""
    cwd = tmp_path_factory.mktemp("chosen")
    chosen = ["evaluate.select=test", "evaluate.every_steps=2", "optim.max_steps=5", "checkpoint.every_steps=3"]
    done = launch("--task", "retrieval", *small(sample_shards), "data.val=null", *chosen, "name=run", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return cwd, done.stdout


def test_a_model_that_the_test_set_chose_says_so_wherever_its_scores_stand(by_test_set: tuple[Path, str]) -> None:
    cwd, said = by_test_set
    assert steps_of(said) == ["step 2", "step 4", "step 5"]
    scores = json.loads((cwd / "runs/run/scores-test.json").read_text())
    assert re.fullmatch(r"model of step \d, the best of 3 evaluations on THE TEST SET", scores["model"])
    for text in (scores["tasks"]["retrieval"]["protocol"], (cwd / "runs/run/retrieval-test.txt").read_text(), said):
        assert "MODEL CHOSEN ON THE TEST SET" in text
    assert f"({scores['model']})" in said
    done = emcl_command("report", "runs/run", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "MODEL CHOSEN ON THE TEST SET" in done.stdout and scores["model"] in done.stdout

    again = launch("--evaluate", "runs/run", "evaluate.select=val", cwd=cwd)  # the model stays one that it chose
    assert again.returncode == 0, again.stdout + again.stderr
    assert "the best of 3 evaluations on THE TEST SET" in again.stdout
    assert "MODEL CHOSEN ON THE TEST SET" in (cwd / "runs/run/retrieval-test.txt").read_text()


def test_a_resumed_run_counts_its_evaluations_on_and_another_split_chooses_anew(
    by_test_set: tuple[Path, str], sample_shards: Path
) -> None:
    cwd, _ = by_test_set
    facts = cwd / "runs/run/run.json"
    shutil.rmtree(cwd / "runs/run/checkpoints/step-00000005")
    done = launch("--task", "retrieval", "--resume", "runs/run", cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert steps_of(done.stdout) == ["step 4", "step 5"] and json.loads(facts.read_text())["evaluations"] == 3
    done = launch("--task", "retrieval", "--resume", "runs/run", cwd=cwd)  # all steps are done
    assert "the best of 3 evaluations on THE TEST SET" in done.stdout
    shutil.rmtree(cwd / "runs/run/checkpoints/step-00000005")
    val = ["evaluate.select=val", f"data.val={sample_shards}/val-000000.tar"]
    done = launch("--task", "retrieval", "--resume", "runs/run", *val, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\(model of step \d, the best of 2 evaluations on val\)", done.stdout)
    assert "CHOSEN ON THE TEST SET" not in done.stdout


def test_without_validation_the_last_model_is_kept_and_said_to_be(sample_shards: Path, tmp_path: Path) -> None:
    own = [*small(sample_shards), "data.val=null", "optim.max_steps=2", "name=run"]
    done = launch("--task", "retrieval", *own, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(model of step 2, the last)" in done.stdout


def test_a_test_set_that_chooses_must_be_there() -> None:
    with pytest.raises(UserError, match=r"evaluate\.select=test wants data\.test"):
        resolve(["retrieval"], overrides=["evaluate.select=test", "data.test=null"])
