"""Norms taken at once are DeepSpeed's own, and see what is not finite, by few operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import small
from emcl import distributed
from emcl.config import resolve
from emcl.distributed import Ranks
from emcl.run_folder import RunFolder
from emcl.train.initialization import open_splits
from emcl.train.loop import Trainer
from ranks import run_on_ranks


class Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def counted(call: Any) -> tuple[Any, int]:
    with Operators() as operators:
        result = call()
    return result, operators.count


def asked_both_ways(ranks: Ranks, shards: Path, folder: Path, precision: str, stage: int) -> dict[str, Any]:
    """After a backward pass: what DeepSpeed's methods say of this rank's gradients, and what replaces them."""
    distributed.quiet_start()
    distributed.compile_nothing()
    own = ["data.workers=0", f"precision={precision}", f"deepspeed=deepspeed/zero{stage}.json"]
    config = resolve(["retrieval"], "sample", [*small(shards), *own])
    device = torch.device("cpu")
    trainer = Trainer(*open_splits(config), ranks, device, RunFolder(folder / f"run{ranks.rank}"))
    (batch,), _ = next(trainer._steps(0))
    trainer.engine.backward(sum(trainer.engine(batch=batch.to(device)).values()))
    optimizer, theirs = trainer.engine.optimizer, DeepSpeedZeroOptimizer
    groups = [(optimizer.averaged_gradients[i], optimizer.params_in_partition[i]) for i in optimizer.averaged_gradients]
    answers: dict[str, Any] = {}
    for state in ("finite", "infinite", "not a number"):
        if state != "finite" and ranks.rank == 0:
            groups[0][0][0].view(-1)[0] = float("inf") if state == "infinite" else float("nan")
        norms = [counted(lambda pair=pair: optimizer.get_grad_norm_direct(*pair)) for pair in groups]
        their_norms = [counted(lambda pair=pair: theirs.get_grad_norm_direct(optimizer, *pair)) for pair in groups]
        bad, few = counted(optimizer.has_overflow_partitioned_grads_serial)
        they, many = counted(lambda: theirs.has_overflow_partitioned_grads_serial(optimizer))
        answers[state] = {
            "norms": [float(norm) for norm, _ in norms], "theirs": [float(norm) for norm, _ in their_norms],
            "bad": bool(bad), "their bad": bool(they), "shape": (bad.shape, they.shape),
            "operators": few + sum(count for _, count in norms),
            "their operators": many + sum(count for _, count in their_norms),
        }  # fmt: skip
    return answers


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 1), ("bf16", 1), ("bf16", 2)])
def test_they_are_deepspeeds(precision: str, stage: int, sample_shards: Path, tmp_path: Path) -> None:
    everyone = run_on_ranks(asked_both_ways, 2, tmp_path, sample_shards, tmp_path, precision, stage)
    for rank, answers in enumerate(everyone):
        for state, one in answers.items():
            assert one["norms"] == one["theirs"], state  # to the bit: other ones would train another model
            assert one["bad"] == one["their bad"] == (state != "finite" and rank == 0)
            assert one["shape"][0] == one["shape"][1]
            assert one["norms"][0] == -1 if state != "finite" else one["norms"][0] > 0  # on all ranks: they summed it
    assert answers["finite"]["operators"] * 4 < answers["finite"]["their operators"]
