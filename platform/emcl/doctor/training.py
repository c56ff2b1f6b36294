"""Training itself: precisions, ZeRO's stages, host waits in a step, resuming to the bit."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from emcl.doctor.checks import Check
from emcl.doctor.trainers import ALL_TASKS, Bench, losses_of, one_step, settings, taken, trainer
from emcl.train.engine import weights

STEPS = 4
CLOSE = {"bf16": 2e-2, "fp16": 1e-2}
"""Relative to the fp32 run's losses."""
STAGES = 1e-4
RESUMED = 6
"""Steps of a run that is continued from its middle."""
OURS = str(Path(__file__).resolve().parent.parent)


def precisions(bench: Bench) -> Iterator[Check]:
    """All tasks at once in each precision, compared with fp32."""
    with trainer(bench, settings(bench, tasks=ALL_TASKS), "fp32") as made:
        wanted = losses_of(made, STEPS)
    yield Check("fp32, all tasks: losses", ", ".join(f"{loss:.4f}" for loss in wanted))
    for precision, close in CLOSE.items():
        if precision == "fp16" and not bench.on_gpu:
            yield Check("fp16", "no GPU here")
            continue
        with trainer(bench, settings(bench, f"precision={precision}", tasks=ALL_TASKS), precision) as made:
            losses = losses_of(made, STEPS)
            skipped = int(made.engine.skipped_steps)
        # fp16 skips its first steps while it searches for its loss scale: the weights are those of the start
        compared = list(zip(losses, wanted, strict=True))[: 1 if skipped else None]
        off = max(abs(one - other) / abs(other) for one, other in compared)
        yield Check(f"{precision}, all tasks: losses beside fp32's", f"{off:.1e}", f"<= {close:.0e}", off <= close)


def zero_stages(bench: Bench) -> Iterator[Check]:
    """ZeRO 1 to 3 give the same losses as no ZeRO."""
    wanted: list[float] = []
    for stage in range(4):
        with trainer(bench, settings(bench, f"deepspeed=deepspeed/zero{stage}.json"), f"zero{stage}") as made:
            losses = losses_of(made, STEPS)
        wanted = wanted or losses
        off = max(abs(one - other) / abs(other) for one, other in zip(losses, wanted, strict=True))
        if stage:
            yield Check(f"ZeRO-{stage} beside none: losses", f"{off:.1e}", f"<= {STAGES:.0e}", off <= STAGES)


def host_waits(bench: Bench) -> Iterator[Check]:
    """Lines of a step at which the host waits for the GPU, by PyTorch's sync debug mode."""
    if not bench.on_gpu:
        yield Check("host waits in a step", "no GPU here")
        return
    for variant in ("reference", "compact"):
        with trainer(bench, settings(bench, f"emcl.variant={variant}", tasks=ALL_TASKS), f"waits-{variant}") as made:
            for step, batches in taken(made, 3):  # the first ones build
                if step < 2:
                    one_step(made, step, batches)
                    continue
                torch.cuda.synchronize()
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    try:
                        one_step(made, step, batches)
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
        lines = Counter(f"{one.filename}:{one.lineno}" for one in said if "synchroniz" in str(one.message))
        ours = {line: count for line, count in lines.items() if line.startswith(OURS) or "/tasks/" in line}
        listed = "\n".join(f"{count} x {line}" for line, count in lines.items())
        yield Check(f"host waits of ours, EMCL {variant}", str(sum(ours.values())), "0", not ours, listed)
        others = sum(lines.values()) - sum(ours.values())
        yield Check(f"host waits of DeepSpeed and others, EMCL {variant}", str(others), detail=listed)


def resuming(bench: Bench) -> Iterator[Check]:
    """With `deterministic=true`, a run continued from its middle, twice, ends with the same bits as without a break."""
    half = RESUMED // 2
    config = settings(bench, "deterministic=true", "emcl.bases=8", tasks=ALL_TASKS)
    ends = []
    for attempt in range(3):
        with trainer(bench, config, "resumed", resuming=attempt > 0) as made:
            for step, batches in taken(made, RESUMED - made.start, made.start):
                one_step(made, step, batches)
                if step + 1 == half:
                    made._save(half)
            ends.append(weights(made.engine, bench.ranks))
            if made.start != (half if attempt else 0):
                raise RuntimeError(f"the run went on from step {made.start}, not {half}")
    for attempt in (1, 2):
        different = [name for name, weight in ends[0].items() if not torch.equal(weight, ends[attempt][name])]
        figure = f"{len(different)} of {len(ends[0])} tensors differ"
        yield Check(f"continued at step {half}, {attempt}", figure, "0", not different, "\n".join(different[:20]))
