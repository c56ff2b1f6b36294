"""One rank of `scaling.py`: times steps of the sample recipe under the given ZeRO stages, which alternate step by step,
and counts the bytes passed to collectives."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SENT = {"bytes": 0}
STEPS, WARM = 4, 1


def counted(name: str, bytes_of: Callable[..., int]) -> None:
    """Wraps a collective of torch.distributed; must run before other modules import it by name."""
    call = getattr(dist, name)

    def wrapper(*arguments: Any, **named: Any) -> Any:
        SENT["bytes"] += bytes_of(*arguments, **named)
        return call(*arguments, **named)

    setattr(dist, name, wrapper)


def size(tensor: Any, *_: Any, **__: Any) -> int:
    return int(tensor.numel() * tensor.element_size())


def second(*tensors: Any, **named: Any) -> int:
    """Size of the input tensor, which is the second argument or passed by name."""
    tensor = named.get("input_tensor", named.get("input", named.get("tensor")))
    return size(tensors[1] if tensor is None else tensor)


def count_all() -> None:
    for name in ("all_reduce", "broadcast", "reduce"):
        counted(name, size)
    for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single", "reduce_scatter_single"):
        if hasattr(dist, name):
            counted(name, second)
    counted("all_gather", second)
    counted("reduce_scatter", lambda _, tensors, *__, **___: sum(map(size, tensors)))


def main() -> None:
    folder, clips, stages, out = Path(sys.argv[1]), sys.argv[2], sys.argv[3].split(","), Path(sys.argv[4])
    count_all()
    from emcl import distributed
    from emcl.config import resolve
    from emcl.run_folder import RunFolder
    from emcl.train.initialization import open_splits
    from emcl.train.loop import Trainer
    from sample_clips import settings

    distributed.quiet_start()
    torch.set_num_threads(1)
    ranks = distributed.start()
    trainers: dict[str, Trainer] = {}
    seconds: dict[str, list[float]] = {stage: [] for stage in stages}
    sent: dict[str, int] = {}
    for stage in stages:
        config = resolve(["retrieval"], "sample", [*settings(clips), f"deepspeed=deepspeed/zero{stage}.json"])
        kept = RunFolder(folder / f"run{stage}")
        trainers[stage] = Trainer(*open_splits(config), ranks, distributed.device(), kept)
        trainers[stage].engine.train()
    batches = [batch for (batch, _), _ in zip(trainers[stages[0]]._steps(0), range(STEPS + WARM), strict=False)]
    for batch in batches:
        for stage, trainer in trainers.items():
            SENT["bytes"], began = 0, time.perf_counter()
            trainer._step(batch)  # its collectives wait for the other rank
            seconds[stage].append(time.perf_counter() - began)
            sent[stage] = SENT["bytes"]
    if ranks.first:
        width, videos = trainer.model.backbone.embed_dim, config.data.batch_size // ranks.world_size
        rows = videos * config.data.frames * width + videos * width  # frames and texts of a rank, forward and backward
        fewest = 4 * (trainer.parameters + 2 * rows) if ranks.world_size > 1 else 0
        rates = {stage: config.data.batch_size / statistics.median(times[WARM:]) for stage, times in seconds.items()}
        out.write_text(json.dumps({"samples_per_second": rates, "sent": sent, "fewest": fewest}))
    distributed.stop()


if __name__ == "__main__":
    main()
