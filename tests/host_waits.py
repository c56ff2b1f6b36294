"""Prints at which lines of a training step a GPU's host would wait for it: `python tests/host_waits.py key=value ...`.

A real step on the CPU, DeepSpeed's engine included, for every variant of EMCL and all tasks together. Each operator is
looked at that gives the host a number or a shape which the device has to find first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from emcl import distributed
from emcl.config import resolve
from emcl.run_folder import RunFolder
from emcl.tracking import open_tracker
from emcl.train.initialization import open_splits
from emcl.train.loop import Trainer

WAITS = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount",
    "unique_consecutive", "_linalg_eigh", "linalg_eig", "_linalg_svd", "linalg_lstsq",
}  # fmt: skip
"""Numbers for the host, results of a size that depends on values, decompositions that look whether they converged."""
TO_THE_HOST = ("cpu", "tolist", "numpy")
"""Methods that no operator tells of where the device is the CPU."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
STEPS = 3
"""The last one is looked at: the first ones allocate."""


class Waits(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[tuple[str, str, str], int] = {}
        self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.operators += 1
        wait = name in WAITS
        if name in INDEXING:
            wait = any(isinstance(item, torch.Tensor) and item.dtype == torch.bool for item in args[1])
        if name == "repeat_interleave" and func._overloadname == "Tensor":
            wait = (kwargs or {}).get("output_size") is None
        if wait:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, name: str) -> None:
        key = name, *calling_lines()
        self.found[key] = self.found.get(key, 0) + 1

    @contextmanager
    def methods(self) -> Iterator[None]:
        """Notes calls of `TO_THE_HOST` too."""
        before = {name: getattr(torch.Tensor, name) for name in TO_THE_HOST}

        def noted(name: str) -> Any:
            def call(tensor: torch.Tensor, *arguments: Any, **how: Any) -> Any:
                self.note(name)
                return before[name](tensor, *arguments, **how)

            return call

        for name in TO_THE_HOST:
            setattr(torch.Tensor, name, noted(name))
        try:
            yield
        finally:
            for name, method in before.items():
                setattr(torch.Tensor, name, method)


def calling_lines() -> tuple[str, str]:
    """The innermost line outside torch's own Python (but for its optimisers), and the next of another file."""
    frames = [frame for frame in traceback.extract_stack() if counts(frame.filename)]
    names = [f"{short(frame.filename)}:{frame.name}" for frame in reversed(frames)]
    return names[0], next((name for name in names[1:] if name.split(":")[0] != names[0].split(":")[0]), "")


def counts(file: str) -> bool:
    inner = "/torch/" in file and "/torch/optim/" not in file
    return not inner and file != __file__ and "<" not in file


def short(file: str) -> str:
    """From the package's name on."""
    return file.split("site-packages/")[-1].split("/platform/")[-1].split("/tasks/")[-1]


def step_of(variant: str, settings: list[str]) -> Waits:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/m.db"
        quiet = ["data.val=null", "data.test=null", "tracking.enabled=false", "data.workers=0"]
        chosen = [*settings, *quiet, f"emcl.variant={variant}"]
        config = resolve(["retrieval", "captioning", "msrvtt_qa"], "sample", chosen)
        ranks = distributed.start()
        trainer = Trainer(*open_splits(config), ranks, distributed.device(), RunFolder(Path(folder) / "run"))
        trainer.tracker = open_tracker(config, "waits", first_rank=True)
        trainer.engine.train()
        watch = Waits()
        for step, (batch, _) in zip(range(STEPS), trainer._steps(0), strict=False):
            trainer._seed(step)
            if step < STEPS - 1:
                trainer._step(batch)
                continue
            with watch, watch.methods():
                losses = trainer._step(batch)
                skipped = trainer._check_skipped(step, batch)
                trainer.meter.add(losses, batch, 0.0, skipped=skipped)
    return watch


if __name__ == "__main__":
    waits, operators = [], 0
    for variant in ("reference", "compact"):
        seen = step_of(variant, sys.argv[1:])
        operators += seen.operators
        for (name, where, called_by), count in seen.found.items():
            waits.append({"variant": variant, "operator": name, "where": where, "by": called_by, "times": count})
    distributed.stop()
    print(json.dumps({"operators": operators, "waits": waits}))
