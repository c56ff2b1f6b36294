"""The model that is kept is the best by the task's own metric, in the metric's own direction."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

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
