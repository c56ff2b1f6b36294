"""`--profile N`: where the time of N steps goes, as a trace for Perfetto and as one screen of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from emcl.disk import write_whole
from emcl.tracking import Tracker

WARM = 5
"""Steps before the profile: the first ones build and allocate."""
PREFIX = "emcl: "
COLLECTIVES = ("gloo:", "nccl:", "nccl", "c10d::")
WIDTH = 30


def phase(name: str) -> record_function:
    """A named part of a step; almost free if nothing is profiled."""
    return record_function(PREFIX + name)


class StepProfile:
    """Rank 0's profile of steps WARM to WARM + `steps` after the start; none if `steps` is 0.

    While it runs, `forward` is split by the parts of the model: towers, temporal transformer, tasks.
    """

    def __init__(
        self, steps: int, model: nn.Module, folder: Path, tracker: Tracker, say: Callable[[str], None]
    ) -> None:
        self.steps, self.model, self.folder, self.tracker, self.say = steps, model, folder, tracker, say
        self._done = 0
        self._profiler: Any = None
        self._hooks: list[Any] = []

    def step(self) -> None:
        """Called before each step."""
        if not self.steps:
            return
        if self._done == WARM:
            self._begin()
        elif self._done == WARM + self.steps:
            self._end()
        self._done += 1

    def __enter__(self) -> StepProfile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._profiler is not None and kind is None:
            self._end()

    def _begin(self) -> None:
        for name, module in _watched_modules(self.model).items():
            self._watch(name, module)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self._profiler = profile(activities=activities)
        self._profiler.__enter__()

    def _watch(self, name: str, module: nn.Module) -> None:
        open_: list[record_function] = []

        def before(*_: Any) -> None:
            open_.append(phase(f"forward/{name}"))
            open_[-1].__enter__()

        def after(*_: Any) -> None:
            open_.pop().__exit__(None, None, None)

        self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _end(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken = self._profiler
        taken.__exit__(None, None, None)
        self._profiler, self.steps_seen = None, self._done - WARM
        for hook in self._hooks:
            hook.remove()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / "trace.json.gz"
        taken.export_chrome_trace(str(trace))
        text = summary(taken.key_averages(), self.steps_seen)
        write_whole(self.folder / "summary.txt", text)
        self.tracker.artifact(trace, "profile")
        self.tracker.artifact(self.folder / "summary.txt", "profile")
        self.say(f"\n{text}\ntrace: {trace} (open it in https://ui.perfetto.dev, or from the run in MLflow)")


def _watched_modules(model: nn.Module) -> dict[str, nn.Module]:
    backbone: Any = model.backbone
    modules = {"image tower": backbone.image, "text tower": backbone.text, "temporal": backbone.temporal}
    tasks: Any = model.tasks
    for task, head in tasks.items():
        key = f"task {task}" if task in modules else task
        modules |= {key: head, **{f"{key}/{name}": child for name, child in head.named_children()}}
    return {name: module for name, module in modules.items() if module is not None}


def summary(averages: Any, steps: int) -> str:
    """Milliseconds a step and shares of each phase, with the costliest operators."""
    events = {event.key: event for event in averages}
    on_device = any(_device_ms(event) > 0 for event in averages)
    phases = {key.removeprefix(PREFIX): event for key, event in events.items() if key.startswith(PREFIX)}
    whole = sum(event.cpu_time_total for name, event in phases.items() if "/" not in name) / 1000 / steps
    lines = [
        f"{steps} steps, {whole:.1f} ms each",
        f"{'':<{WIDTH}}{'ms':>10}{'share':>8}" + "   on the device" * on_device,
    ]
    for name in ("data", "forward", "backward", "optimizer"):
        for key in [name, *sorted(key for key in phases if key.startswith(f"{name}/"))]:
            if key in phases:
                label = f"  {key.partition('/')[2]}" if "/" in key else key
                lines.append(_line(label, phases[key], whole, steps, on_device))
    sent = [event for key, event in events.items() if key.startswith(COLLECTIVES)]
    spent = sum(event.self_cpu_time_total for event in sent) / 1000 / steps
    lines.append(f"{'communication, within these':<{WIDTH}}{spent:>10.2f}{spent / whole:>8.0%}")
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    costly = sorted((e for k, e in events.items() if not k.startswith(PREFIX)), key=lambda e: -getattr(e, order))[:8]
    lines.append("costliest operators:")
    lines += [f"  {event.key[:50]:<52}{getattr(event, order) / 1000 / steps:>8.2f} ms" for event in costly]
    return "\n".join(lines)


def _line(label: str, event: Any, whole: float, steps: int, on_device: bool) -> str:
    spent = event.cpu_time_total / 1000 / steps
    device = f"{_device_ms(event) / steps:>16.2f}" if on_device else ""
    return f"{label:<{WIDTH}}{spent:>10.2f}{spent / whole:>8.0%}{device}"


def _device_ms(event: Any) -> float:
    return float(getattr(event, "device_time_total", 0.0)) / 1000
