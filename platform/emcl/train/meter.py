"""Training metrics, reported every few steps: means over ranks and steps, speed, memory, and stragglers.

Between two reports there is no device synchronisation and no communication.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from emcl.config import Config
from emcl.data.batch import Batch
from emcl.data.loading_time import LoadingTime
from emcl.distributed import Ranks, observe_exchanges
from emcl.errors import UserError
from emcl.train.bad_clips import BadClips
from emcl.train.flops import flops_where_known, peak_flops
from emcl.train.step_clock import PARTS, WAITING, StepClock
from emcl.train.stragglers import Straggler, find_straggler

GIB = 2**30


class Meter:
    """Sums between two reports."""

    def __init__(self, config: Config, ranks: Ranks, device: torch.device, bad: BadClips) -> None:
        self.ranks, self.device, self.bad = ranks, device, bad
        self.clock = StepClock(device)
        if ranks.world_size > 1:
            observe_exchanges(self.clock.wait)
        self.peak = peak_flops(device, config.precision)
        self.flops = flops_where_known(config) if self.peak else None
        self.restart()

    def restart(self) -> None:
        """Resets the sums and the clock, such as after an evaluation."""
        self.losses: dict[str, Tensor] = {}
        self.counted = self.steps = self.samples = self.frames = 0
        self.loading = LoadingTime()
        self.clock.restart()
        self.began = time.perf_counter()

    def add(
        self, losses: dict[str, Tensor], micro_batches: list[Batch], waited: float, *, skipped: bool = False
    ) -> None:
        """Adds a step; the losses of a skipped one do not count."""
        for name, value in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + (torch.zeros_like(value) if skipped else value)
        self.counted += not skipped
        self.steps += 1
        for batch in micro_batches:
            self.samples += len(batch.ids)
            self.frames += batch.frame_count
            self.loading += batch.loading
            self.bad.add(batch.bad)
        self.clock.loaded(waited)

    def read(self, restarts: int) -> tuple[dict[str, float], str]:
        """Means over ranks and steps since the last call, and a line about the rank that the others wait for, if any.

        Args:
            restarts: restarts of this rank's loaders so far.

        Raises:
            UserError: a loss that is not finite, or too many broken clips.
        """
        names = list(self.losses) if self.counted else []  # if all steps were skipped, there is no loss
        counts = torch.tensor(
            [self.samples, self.frames, len(self.bad.new), restarts], device=self.device, dtype=torch.float64
        )
        losses = [self.losses[name].double() / self.counted for name in names]
        # all queued work is done once these are on the host
        sums = self.ranks.sum(torch.cat([*(loss.view(1) for loss in losses), counts])).tolist()
        parts_RP, elapsed = self._of_all_ranks(time.perf_counter() - self.began)
        steps = max(1, self.steps)
        means = {f"train/{name}": total / self.ranks.world_size for name, total in zip(names, sums, strict=False)}
        samples, frames, bad, restarted = sums[len(names) :]
        work_RP = parts_RP[:, : len(PARTS)].numpy()
        line = self._line(find_straggler(work_RP, elapsed), elapsed, steps)
        self.restart()
        for name, value in means.items():
            if not abs(value) < float("inf"):
                raise UserError(
                    f"{name} is {value}: lower optim.lr, or train with precision=fp32; the last checkpoint is kept"
                )
        if bad:
            self.bad.exchange()
        of_parts = dict(zip((*PARTS, WAITING), parts_RP.mean(0).tolist(), strict=False))
        return {
            **means,
            **({"train/loss": sum(means.values())} if means else {}),
            "samples_per_second": samples / elapsed,
            "frames_per_second": frames / elapsed,
            "data_wait_share": of_parts["loading"] / elapsed,
            **{f"seconds_a_step/{phase}": seconds / steps for phase, seconds in of_parts.items()},
            **self._of_device(frames, samples, elapsed, float(parts_RP[:, -1].max())),
            "bad_clips": float(len(self.bad)),
            "loader_restarts": restarted,
        }, line

    def _of_all_ranks(self, elapsed: float) -> tuple[Tensor, float]:
        """(ranks, PARTS, WAITING, peak GiB of the device's memory) and the longest elapsed time, alike on all ranks.

        By them each rank decides whether all exchange details: with its own clock, a rank might wait alone.
        """
        own_seconds = self.clock.read()
        peak = torch.cuda.max_memory_allocated(self.device) / GIB if self.device.type == "cuda" else 0.0
        columns = [*(own_seconds[phase] for phase in (*PARTS, WAITING)), peak, elapsed]
        everyone = torch.zeros(self.ranks.world_size, len(columns), dtype=torch.float64)
        everyone[self.ranks.rank] = torch.tensor(columns, dtype=torch.float64)
        everyone = self.ranks.sum(everyone.to(self.device)).cpu()
        return everyone[:, :-1], float(everyone[:, -1].max())

    def _of_device(self, frames: float, samples: float, elapsed: float, peak_gib: float) -> dict[str, float]:
        if self.device.type != "cuda":
            return {}
        metrics = {"gpu_memory_peak_gib": peak_gib}
        if self.flops is not None and self.peak is not None:
            arithmetic = self.flops.of_step(int(frames), int(samples))
            metrics["mfu"] = arithmetic / elapsed / (self.peak * self.ranks.world_size)
        return metrics

    def _line(self, straggler: Straggler | None, elapsed: float, steps: int) -> str:
        """All ranks have found the same straggler; only that rank knows the details of its loading."""
        if straggler is None:
            return ""
        details = self.ranks.gather_objects(self.loading.detail() if straggler.part == "loading" else "")
        return straggler.line(elapsed, steps, details[straggler.rank])
